"""Linear cross-entropy over chunks of rows, made of torch's matrix product and the cross-entropy kernels of a backend.

A chunk's logits lie in a buffer that every chunk uses again, and their gradient takes their place. Nothing is ever as
large as the whole matrix of logits.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.cross_entropy import linear_reference
from fusewright_kernels.cross_entropy.reference import Options
from fusewright_kernels.triton_support import INTERPRETED

# Bytes of the logits of a chunk. More rows make better products, up to where they fill the machine.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
FEWEST_ROWS = 64

# Rows of the weight whose gradient is summed at a time where that takes a copy in another type.
_WEIGHT_ROWS = 8192


class _Chunk(NamedTuple):
    rows: slice
    logits: Tensor
    losses: Tensor
    statistics: Tensor


def _chunks(
    backend: str,
    losses: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *options: Any,
) -> Iterator[_Chunk]:
    """The logits of each chunk in turn; fills ``losses``."""
    forward = library.overload("cross_entropy_forward", backend)
    rows, classes = input.shape[0], weight.shape[0]
    most = _rows_of_a_chunk(input, weight)
    buffer = input.new_empty((min(rows, most), classes))
    for begin in range(0, rows, most):
        chunk = slice(begin, min(begin + most, rows))
        logits = buffer[: chunk.stop - begin]
        if bias is None:
            torch.mm(input[chunk], weight.mT, out=logits)
        else:
            torch.addmm(bias, input[chunk], weight.mT, out=logits)
        losses[chunk], statistics = forward(logits, target[chunk], class_weight, *options)
        yield _Chunk(chunk, logits, losses[chunk], statistics)


def _rows_of_a_chunk(input: Tensor, weight: Tensor) -> int:
    return max(CHUNK_BYTES[input.device.type] // (weight.shape[0] * input.element_size()), FEWEST_ROWS)


def forward(backend: str, input: Tensor, *arguments: Any) -> Tensor:
    losses = _empty_losses(input)
    for _ in _chunks(backend, losses, input, *arguments):
        pass
    return losses


def gradients(
    backend: str,
    grad_losses: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, need_input, need_weight, need_bias = arguments
    need_bias = need_bias and bias is not None
    backward = library.overload("cross_entropy_backward_out", backend)
    losses = _empty_losses(input)
    if grad_losses is None:
        grad_losses = torch.ones_like(losses)
    wide = losses.dtype
    grad_input = input.new_empty(input.shape) if need_input else input.new_empty((0,))
    # What several chunks add to is kept wide; a single product rounds its own sums.
    single = input.shape[0] <= _rows_of_a_chunk(input, weight)
    summed = weight.dtype if single else wide
    # The first chunk overwrites it.
    begin_weight = weight.new_zeros if input.shape[0] == 0 else weight.new_empty
    grad_weight = begin_weight(weight.shape, dtype=summed) if need_weight else weight.new_empty((0,))
    grad_bias = weight.new_zeros((weight.shape[0],), dtype=wide) if need_bias else weight.new_empty((0,))
    for rows, logits, _, statistics in _chunks(backend, losses, input, weight, bias, target, class_weight, *options):
        backward(grad_losses[rows], logits, target[rows], class_weight, statistics, *options, logits)
        if need_input:
            torch.mm(logits, weight, out=grad_input[rows])
        if need_weight:
            _add_product(grad_weight, logits, input[rows], overwrite=rows.start == 0)
        if need_bias:
            grad_bias += logits.sum(0, dtype=wide)
    return losses, grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_product(total: Tensor, grad_logits: Tensor, input: Tensor, *, overwrite: bool) -> None:
    """total += grad_logits^T input, or = where it holds nothing yet"""
    if total.dtype is input.dtype:
        total.addmm_(grad_logits.mT, input, beta=0 if overwrite else 1)
        return
    for begin in range(0, total.shape[0], _WEIGHT_ROWS):
        classes = slice(begin, begin + _WEIGHT_ROWS)
        product = torch.mm(grad_logits[:, classes].mT, input)
        if overwrite:
            total[classes] = product
        else:
            total[classes] += product


def _empty_losses(input: Tensor) -> Tensor:
    return input.new_empty((input.shape[0],), dtype=torch.promote_types(input.dtype, torch.float32))


def _plain_forward(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *arguments: Any) -> Tensor:
    class_weight, *options = arguments
    return linear_reference.losses(input, weight, bias, target, class_weight, Options(*options))


def _plain_gradients(
    grad_losses: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target, class_weight, *options, need_input, need_weight, need_bias = arguments
    given = (input, weight, bias, target, class_weight, Options(*options))
    losses = linear_reference.losses(*given)
    if grad_losses is None:
        grad_losses = torch.ones_like(losses)
    grad_input, grad_weight, grad_bias = linear_reference.backward(grad_losses, *given)
    return (
        losses,
        grad_input.contiguous() if need_input else input.new_empty((0,)),
        grad_weight.contiguous() if need_weight else weight.new_empty((0,)),
        grad_bias.contiguous() if need_bias else weight.new_empty((0,)),
    )


def attach() -> None:
    library.attach_reference("linear_cross_entropy_forward", _plain_forward)
    library.attach_reference("linear_cross_entropy_gradients", _plain_gradients)
    for backend in library.COMPILED_BACKENDS:
        for name, implementation in (("forward", forward), ("gradients", gradients)):
            library.attach_composed(
                f"linear_cross_entropy_{name}", backend, partial(implementation, backend), interpreted=INTERPRETED
            )
