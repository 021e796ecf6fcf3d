"""Softmax as an ``autograd.Function``, with the rules for vmap and for double backward.

The kernels take any dimension and any strides, so a vmap dimension is only one more dimension in front.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.softmax import reference


class Softmax(torch.autograd.Function):
    """(input, dim, output_dtype, backend) -> output; ``dim`` is not negative."""

    @staticmethod
    def forward(input: Tensor, dim: int, output_dtype: torch.dtype, backend: str) -> Tensor:
        return library.overload("softmax_forward", backend)(input, dim, output_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.dim, _, ctx.backend = inputs
        ctx.input_dtype = input.dtype
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        arguments = (grad_output, output, ctx.dim, ctx.input_dtype)
        if autograd.second_derivative_possible(grad_output, output):
            return SoftmaxBackward.apply(*arguments, ctx.backend), None, None, None
        return library.overload("softmax_backward", ctx.backend)(*arguments), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], input: Tensor, dim: int, *arguments: Any) -> tuple[Any, Any]:
        return Softmax.apply(autograd.batch_first(input, in_dims[0], info.batch_size), dim + 1, *arguments), 0


class SoftmaxBackward(torch.autograd.Function):
    """(grad_output, output, dim, input_dtype, backend) -> grad_input."""

    @staticmethod
    def forward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype, backend: str) -> Tensor:
        return library.overload("softmax_backward", backend)(grad_output, output, dim, input_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, saved_output, ctx.dim, ctx.input_dtype, _ = inputs
        ctx.save_for_backward(grad_output, saved_output)

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
        def plain(grad_output: Tensor, output: Tensor) -> list[Tensor]:
            return [reference.softmax_backward(grad_output, output, ctx.dim, ctx.input_dtype)]

        return *autograd.pullback(plain, ctx.saved_tensors, [grad_grad_input]), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad_output: Tensor, output: Tensor, dim: int, *arguments: Any
    ) -> tuple[Any, Any]:
        grad_output = autograd.batch_first(grad_output, in_dims[0], info.batch_size)
        output = autograd.batch_first(output, in_dims[1], info.batch_size)
        return SoftmaxBackward.apply(grad_output, output, dim + 1, *arguments), 0
