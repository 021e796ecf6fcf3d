"""What must hold whatever the values are: bitwise invariances and identities that need no oracle."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fusewright.testing.budgets import BUDGETS
from fusewright.testing.errors import bits, bits_equal, error_in_u, magnitude_in, rms, unit

TensorFunction: TypeAlias = Callable[..., "Tensor | Sequence[Tensor]"]


def _results(function: TensorFunction, inputs: Sequence[Tensor]) -> list[Tensor]:
    result = function(*inputs)
    return [result] if isinstance(result, Tensor) else [tensor for tensor in result if tensor is not None]


def _assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    if len(actual) != len(expected):
        raise AssertionError(f"{what}: {len(actual)} results, expected {len(expected)}")
    for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
        if not bits_equal(left, right):
            if left.shape != right.shape or left.dtype != right.dtype:
                detail = f"{left.dtype} {tuple(left.shape)}, expected {right.dtype} {tuple(right.shape)}"
            else:
                detail = f"{int((bits(left) != bits(right)).sum())} of {left.numel()} elements have other bits"
            raise AssertionError(f"{what}: result {index} has changed: {detail}")


def assert_repeatable(function: TensorFunction, inputs: Sequence[Tensor], runs: int = 3) -> None:
    """Every run gives the same bits."""
    first = [tensor.clone() for tensor in _results(function, inputs)]
    for run in range(1, runs):
        _assert_same_bits(_results(function, inputs), first, f"run {run + 1}")


def assert_thread_count_invariant(
    function: TensorFunction, inputs: Sequence[Tensor], counts: Sequence[int] = (1, 2, 3)
) -> None:
    """Every ``torch.set_num_threads`` gives the same bits."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(counts[0])
        first = _results(function, inputs)
        for count in counts[1:]:
            torch.set_num_threads(count)
            _assert_same_bits(_results(function, inputs), first, f"{count} threads against {counts[0]}")
    finally:
        torch.set_num_threads(before)


def assert_batch_invariant(function: TensorFunction, inputs: Sequence[Tensor]) -> None:
    """A row gives the same bits alone, in any slice of the batch and at any place in it.

    Dimension 0 of every input and of every result is the batch; what is not batched belongs into a closure.
    """
    rows = inputs[0].shape[0]
    whole = _results(function, inputs)
    slices = [slice(row, row + 1) for row in sorted({0, rows // 2, rows - 1})]
    slices += [slice(0, size) for size in (2, 3, rows - 1) if 0 < size < rows]
    for part in slices:
        actual = _results(function, [tensor[part] for tensor in inputs])
        _assert_same_bits(actual, [tensor[part] for tensor in whole], f"rows {part.start} to {part.stop - 1} alone")
    assert_row_permutation_equivariant(function, inputs)


def assert_row_permutation_equivariant(function: TensorFunction, inputs: Sequence[Tensor]) -> None:
    """Reversing the batch reverses the result, to the bit."""
    actual = _results(function, [tensor.flip(0) for tensor in inputs])
    _assert_same_bits(actual, [tensor.flip(0) for tensor in _results(function, inputs)], "rows in reverse order")


def assert_column_permutation_equivariant(
    function: TensorFunction, inputs: Sequence[Tensor], seed: int = 0, magnitude: float | None = None
) -> None:
    """Permuting the last dimension of every input permutes that of every result, to the error of two sums."""
    order = torch.randperm(inputs[0].shape[-1], generator=torch.Generator().manual_seed(seed)).to(inputs[0].device)
    actual = _results(function, [tensor[..., order] for tensor in inputs])
    for permuted, original in zip(actual, _results(function, inputs), strict=True):
        _assert_close(permuted, original[..., order], "columns in another order", magnitude)


def assert_scale_invariant(function: TensorFunction, input: Tensor, scale: float = 2.0**6) -> None:
    """``function(scale * input)`` is ``function(input)``: normalisation with eps 0. A power of two scales exactly."""
    for scaled, original in zip(_results(function, [input * scale]), _results(function, [input]), strict=True):
        _assert_close(scaled, original, f"input times {scale:g}")


def assert_shift_invariant(
    function: TensorFunction, input: Tensor, shift: float, magnitude: float | None = None
) -> None:
    """``function(input + shift)`` is ``function(input)``: layer normalisation and softmax.

    The sum must be exact in the input's dtype. ``magnitude`` is the size of the shift as it enters the result.
    """
    shifted = input + shift
    if not torch.equal(shifted.double(), input.double() + shift):
        raise ValueError(f"shift is {shift}, expected one that adds to the input without rounding")
    for moved, original in zip(_results(function, [shifted]), _results(function, [input]), strict=True):
        computed = None if magnitude is None else magnitude_in(magnitude, torch.float32, moved.dtype)
        _assert_close(moved, original, f"input plus {shift:g}", computed)


def assert_rows_sum_to(value: float, result: Tensor, terms: Tensor | None = None, dim: int = -1) -> None:
    """Each sum over ``dim`` is ``value``, to the rounding of what was summed.

    A gradient that is free of its row's mean sums to 0, a softmax to 1.

    Args:
        value: the sum.
        result: what is summed, in float64.
        terms: the size of each element of ``result`` before it cancelled, where that is larger than itself.
        dim: the dimension to sum over.
    """
    _assert_sums(result.detach().double(), value, dim, result.dtype, terms)


def assert_inner_products(value: float, left: Tensor, right: Tensor, terms: Tensor | None = None) -> None:
    """Each inner product over the last dimension is ``value``, to the rounding of ``left``.

    The gradient of a function that does not change along its input is orthogonal to it: <gradient, input> is 0 for RMS
    normalisation with eps 0.
    """
    scaled = None if terms is None else terms.detach().double() * right.detach().double()
    _assert_sums(left.detach().double() * right.detach().double(), value, -1, left.dtype, scaled)


def _assert_sums(products: Tensor, value: float, dim: int, dtype: torch.dtype, terms: Tensor | None) -> None:
    sizes = products.abs() if terms is None else torch.maximum(products.abs(), terms.detach().double().abs())
    scale = max(rms(sizes.square().sum(dim).sqrt()), abs(value)) * unit(dtype)
    error = rms(products.sum(dim) - value)
    allowed = BUDGETS[dtype].gradient
    if not error <= allowed * scale:
        raise AssertionError(f"sums over dimension {dim} are off {value:g} by {error:.3g}, above {allowed * scale:.3g}")


def _assert_close(actual: Tensor, expected: Tensor, what: str, magnitude: float | None = None) -> None:
    """Two results of one dtype, each with its own rounding, differ by no more than two budgets."""
    error = error_in_u(actual, expected.double(), magnitude)
    allowed = 2.0 * BUDGETS[actual.dtype].gradient
    if not error <= allowed:
        raise AssertionError(f"{what}: the result has changed by {error:.3g}u, expected at most {allowed:g}u")
