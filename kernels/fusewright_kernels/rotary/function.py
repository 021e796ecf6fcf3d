"""Rotary position embedding as an ``autograd.Function``: a rotation, whose gradient is the rotation back."""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library


class Rotary(torch.autograd.Function):
    """(input, cos, sin, positions, interleaved, inverse, backend) -> output."""

    @staticmethod
    def forward(
        input: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
        inverse: bool,
        backend: str,
    ) -> Tensor:
        return library.overload("rotary_forward", backend)(input, cos, sin, positions, interleaved, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, positions, ctx.interleaved, ctx.inverse, ctx.backend = inputs
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (grad_output, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
        if autograd.second_derivative_possible(grad_output):
            return Rotary.apply(*arguments, ctx.backend), *[None] * 6
        return library.overload("rotary_forward", ctx.backend)(*arguments), *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        input, cos, sin, positions, *arguments = inputs
        size = info.batch_size
        input = autograd.batch_first(input, in_dims[0], size)
        sequences = input.shape[1]
        if in_dims[1] is not None or in_dims[2] is not None or cos.shape[0] != 1:
            # A table for every sequence of every sample.
            cos, sin = (
                autograd.batch_first(table, dim, size).expand(size, sequences, -1, -1).flatten(0, 1)
                for table, dim in ((cos, in_dims[1]), (sin, in_dims[2]))
            )
        if positions is not None:
            positions = autograd.batch_first(positions, in_dims[3], size).flatten(0, 1)
        output = Rotary.apply(input.flatten(0, 1), cos, sin, positions, *arguments)
        return output.unflatten(0, (size, sequences)), 0
