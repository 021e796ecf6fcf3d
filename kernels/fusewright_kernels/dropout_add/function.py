"""Dropout with a residual addition as an ``autograd.Function``: linear, so its gradient is the same op without a
residual, and that is its own gradient in turn.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library, philox
from fusewright_kernels.dropout_add import reference


def keep_mask_of(input: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """The keep mask in the shape of ``input``, None without dropout."""
    if seed is None or dropout_p == 0.0:
        return None
    return philox.keep_mask(seed, input.shape[:-1].numel(), input.shape[-1], dropout_p).reshape(input.shape)


class DropoutAdd(torch.autograd.Function):
    """(input, residual, seed, dropout_p, backend) -> output."""

    @staticmethod
    def forward(input: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float, backend: str) -> Tensor:
        return library.overload("dropout_add", backend)(input, residual, seed, dropout_p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, residual, seed, ctx.dropout_p, ctx.backend = inputs
        ctx.has_residual = residual is not None
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        grad_input = grad_output
        if seed is not None and ctx.needs_input_grad[0]:
            if autograd.second_derivative_possible(grad_output):
                grad_input = DropoutAdd.apply(grad_output, None, seed, ctx.dropout_p, ctx.backend)
            else:
                grad_input = library.overload("dropout_add", ctx.backend)(grad_output, None, seed, ctx.dropout_p)
        return grad_input, grad_output if ctx.has_residual else None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        dropout_p, _ = inputs[3:]

        # Rows of the kernel draw their own words; samples with one seed must draw the same.
        def plain(input: Tensor, residual: Tensor | None, seed: Tensor | None) -> Tensor:
            return reference.dropout_add(input, residual, keep_mask_of(input, seed, dropout_p), dropout_p)

        return torch.vmap(plain, in_dims[:3])(*inputs[:3]), 0
