"""Normalisation of tensors in any memory layout, with guarded memory around them and poison in fresh memory."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_support import Target, add_norm, add_norms, dtypes, norm, norms, targets, with_gradients

from fusewright import testing
from fusewright.testing import layouts
from fusewright_kernels.normalization import reference


def _oracle(op, *inputs):
    center = op.endswith("layer_norm")
    if op.startswith("add_"):
        return with_gradients(
            lambda x, r, w, b: reference.add_norm_with_statistics(
                x, r, w, b, None, 1, 1e-5, center, 0.0, 0.0, torch.float64
            )[:2],
            [tensor.cpu().double() for tensor in inputs],
        )
    return with_gradients(
        lambda x, w, b: reference.norm(x, w, b, 1, 1e-5, center, 0.0), [tensor.cpu().double() for tensor in inputs]
    )


def _assert_close(actual, expected, forwards, magnitude=1.0):
    for index, (result, oracle) in enumerate(zip(actual, expected, strict=True)):
        direction = "forward" if index < forwards else "gradient"
        computed = testing.magnitude_in(magnitude, torch.float32, result.dtype)
        testing.assert_accurate(result.cpu(), oracle, direction, magnitude=computed, name=f"result {index}")


def _layout_pairs(left, right, target):
    """Every layout of one with every layout of the other."""
    pairs = list(itertools.product(testing.layout_variants(left), testing.layout_variants(right)))
    return [(left, right) for (_, left), (_, right) in (pairs[::7] if target.interpreted else pairs)]


@dtypes
@norms
@targets
def test_every_layout_of_input_and_gradient(target, op, dtype):
    shape = (2, 3, 40) if target.interpreted else (6, 5, 96)
    input, grad = target.tensor(*shape, dtype=dtype), target.tensor(*shape, dtype=dtype, seed=3)
    weight, bias = target.tensor(shape[-1], dtype=dtype, seed=1), target.tensor(shape[-1], dtype=dtype, seed=2)
    wide = [tensor.cpu().double().requires_grad_() for tensor in (input, weight, bias)]
    oracle = reference.norm(*wide, 1, 1e-5, op == "layer_norm", 0.0)
    expected = [oracle.detach(), *torch.autograd.grad(oracle, wide, grad.cpu().double())]
    for variant, grad_variant in _layout_pairs(input, grad, target):
        leaves = [tensor.detach().requires_grad_() for tensor in (variant, weight, bias)]
        output = norm(op, target, *leaves)
        actual = [output.detach(), *torch.autograd.grad(output, leaves, grad_variant)]
        assert target.backend == "reference" or output.is_contiguous()
        _assert_close(actual, expected, 1)


@norms
@targets
def test_every_layout_of_the_parameters(target, op):
    input = target.tensor(7, 64)
    weight, bias = torch.full((64,), 1.5, device=target.device), target.tensor(64, seed=2)
    expected = norm(op, target, input, weight, bias)
    for name, variant in testing.layout_variants(weight):
        for bias_name, bias_variant in testing.layout_variants(bias):
            actual = norm(op, target, input, variant, bias_variant)
            testing.assert_accurate(actual.cpu(), expected.cpu().double(), name=f"weight {name}, bias {bias_name}")


@norms
@targets
def test_an_expanded_gradient(target, op):
    """``output.sum().backward()`` sends a gradient whose every step is 0."""
    input, weight = target.tensor(9, 70).requires_grad_(), target.tensor(70, seed=1).requires_grad_()
    norm(op, target, input, weight).sum().backward()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (input, weight)]
    norm(op, target, *leaves).backward(torch.ones(9, 70, device=target.device))
    testing.assert_accurate(input.grad.cpu(), leaves[0].grad.cpu().double(), "gradient")
    testing.assert_accurate(weight.grad.cpu(), leaves[1].grad.cpu().double(), "gradient")


@norms
@targets
def test_per_head_views_of_a_fused_projection(target, op):
    """Queries as a view of one (B, T, 3, H, D) projection: three steps in the rows, none of them mergeable."""
    projection = target.tensor(2, 5, 3, 4, 32)
    weight = target.tensor(32, seed=1)
    query = projection[:, :, 0].transpose(1, 2)
    assert not query.is_contiguous()
    assert testing.bits_equal(norm(op, target, query, weight), norm(op, target, query.contiguous(), weight))


@add_norms
@targets
def test_the_fused_addition_of_two_layouts(target, op):
    input, residual = target.tensor(8, 48), target.tensor(8, 48, seed=1)
    weight, bias = target.tensor(48, seed=2), target.tensor(48, seed=3)
    expected = _oracle(op, input, residual, weight, bias)
    for left, right in _layout_pairs(input, residual, target):
        actual = with_gradients(lambda *tensors: add_norm(op, target, *tensors), [left, right, weight, bias])
        _assert_close(actual, expected, 2)


@targets
def test_layouts_and_shapes_fuzzed(target):
    examples = 10 if target.interpreted else 120

    @layouts.derandomized(examples)
    @given(
        layouts.row_shapes(), layouts.dtypes(), layouts.dtypes(), layouts.layouts(), layouts.layouts(), layouts.seeds(),
        st.sampled_from(["layer_norm", "rms_norm"]),
    )  # fmt: skip
    def fuzz(shape, dtype, parameter_dtype, layout, grad_layout, seed, op):
        input = target.tensor(*shape, dtype=dtype, seed=seed)
        weight, bias = (target.tensor(shape[-1], dtype=parameter_dtype, seed=seed + i) for i in (1, 2))
        leaves = [layout(input).detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        wide = [tensor.detach().cpu().double().requires_grad_() for tensor in (input, weight, bias)]
        grad = target.tensor(*shape, dtype=dtype, seed=seed + 3)
        output, oracle = norm(op, target, *leaves), reference.norm(*wide, 1, 1e-5, op == "layer_norm", 0.0)
        actual = [output.detach(), *torch.autograd.grad(output, leaves, grad_layout(grad))]
        expected = [oracle.detach(), *torch.autograd.grad(oracle, wide, grad.cpu().double())]
        _assert_close(actual, expected, 1, _terms(input, weight, grad))

    fuzz()


def _terms(input, weight, grad):
    """Size of the largest terms of any result: the gradient's before they cancel, and the normalised row's own."""
    if input.numel() == 0:
        return 1.0
    x = input.cpu().double()
    rstd = (x.var(-1, correction=0) + 1e-5).rsqrt() if x.shape[-1] > 1 else torch.tensor(1e-5**-0.5)
    sizes = (rstd * (1.0 + x.abs().amax(-1)), weight.abs(), grad.abs())
    return math.prod(max(1.0, size.max().item()) for size in sizes)


@dtypes
@norms
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 100, 257])
@targets
def test_nothing_beside_a_tensor_is_read_or_written(target, columns, op, dtype):
    tensors = [
        target.tensor(*size, dtype=dtype, seed=i)
        for i, size in enumerate([(5, columns), (columns,), (columns,), (5, columns)])
    ]
    for offset in (0, 1):
        guards = [testing.guarded(layout(tensor), offset) for layout in (layouts.contiguous, layouts.gapped)
                  for tensor in tensors]  # fmt: skip
        for input, weight, bias, grad in (guards[:4], guards[4:]):
            leaves = [guard.tensor.requires_grad_() for guard in (input, weight, bias)]
            with testing.poisoned_allocations(), testing.guarded_allocations():
                output = norm(op, target, *leaves)
                gradients = torch.autograd.grad(output, leaves, grad.tensor)
            testing.assert_no_nan(output, *gradients)
            assert all(result.abs().max() < 1e30 for result in (output, *gradients))
        for guard in guards:
            guard.check()


@add_norms
@pytest.mark.parametrize("columns", [1, 7, 33, 100])
@targets
def test_nothing_beside_a_tensor_of_the_fused_addition_is_read_or_written(target, columns, op):
    sizes = [(5, columns), (5, columns), (columns,), (columns,), (5, columns), (5, columns)]
    guards = [testing.guarded(target.tensor(*size, seed=i), 1) for i, size in enumerate(sizes)]
    leaves = [guard.tensor.requires_grad_() for guard in guards[:4]]
    with testing.poisoned_allocations(), testing.guarded_allocations():
        outputs = add_norm(op, target, *leaves, dropout_p=0.25, seed=3)
        gradients = torch.autograd.grad(outputs, leaves, [guard.tensor for guard in guards[4:]])
    testing.assert_no_nan(*outputs, *gradients)
    assert all(result.abs().max() < 1e30 for result in (*outputs, *gradients))
    for guard in guards:
        guard.check()


@dtypes
@norms
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 100, 257])
@targets
def test_nothing_beside_out_is_written(target, columns, op, dtype):
    for offset in (0, 1):
        out = testing.GuardedTensor((5, columns), dtype=dtype, device=target.device, offset=offset)
        norm(op, target, target.tensor(5, columns, dtype=dtype), out=out.tensor)
        out.check("out")
        testing.assert_no_nan(out.tensor)


def test_buffers_of_the_triton_launchers_are_seen_by_the_allocation_guard():
    target = Target("triton", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        norm("layer_norm", target, target.tensor(2, 8))
    except ValueError as error:
        pytest.skip(str(error))
    with testing.guarded_allocations() as guard:
        norm("layer_norm", target, target.tensor(2, 8))
    assert guard.buffers
