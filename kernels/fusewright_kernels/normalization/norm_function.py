"""Normalisation as an ``autograd.Function``, with the rules for vmap and for double backward.

Under vmap a batched input is one more leading dimension of the kernel. A batched weight, or a weight gradient per
sample, has no kernel and is the plain formula, vectorised. The backward is a Function of its own whose derivative is
that of the plain formula.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.normalization import reference


class Norm(torch.autograd.Function):
    """(input, weight, bias, ...) -> (output, statistics); statistics have no derivative."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_ndim: int,
        eps: float,
        center: bool,
        weight_offset: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        forward = library.overload("norm_forward", backend)
        return forward(input, weight, bias, normalized_ndim, eps, center, weight_offset, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, bias, *ctx.arguments = inputs
        _, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # or zeros would be made for the statistics
        ctx.save_for_backward(input, weight, bias, statistics)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        input, weight, bias, statistics = ctx.saved_tensors
        normalized_ndim, eps, center, weight_offset, backend = ctx.arguments
        wanted = ctx.needs_input_grad[:3]
        arguments = (grad_output, input, statistics, weight, bias)
        if autograd.second_derivative_possible(grad_output, input, weight):
            gradients = NormBackward.apply(
                *arguments, normalized_ndim, eps, center, weight_offset, *wanted, backend
            )  # fmt: skip
        else:
            backward = library.overload("norm_backward", backend)
            gradients = backward(*arguments, normalized_ndim, center, weight_offset, *wanted)
        return *autograd.only_wanted(gradients, wanted), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        input, weight, bias, normalized_ndim, eps, center, weight_offset, backend = inputs
        if in_dims[1] is not None or in_dims[2] is not None:

            def plain(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
                return reference.norm_with_statistics(
                    input, weight, bias, normalized_ndim, eps, center, weight_offset
                )  # fmt: skip

            return torch.vmap(plain, in_dims[:3])(input, weight, bias), (0, 0)
        input = autograd.batch_first(input, in_dims[0], info.batch_size)
        output, statistics = Norm.apply(
            input, weight, bias, normalized_ndim, eps, center, weight_offset, backend
        )  # fmt: skip
        return (output, statistics.unflatten(1, (info.batch_size, -1))), (0, 1)


class NormBackward(torch.autograd.Function):
    """(grad_output, input, statistics, weight, bias, ...) -> gradients of input, weight and bias."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        statistics: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_ndim: int,
        eps: float,
        center: bool,
        weight_offset: float,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        backward = library.overload("norm_backward", backend)
        wanted = (need_input, need_weight, need_bias)
        return backward(grad_output, input, statistics, weight, bias, normalized_ndim, center, weight_offset, *wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_output, input, _, weight, bias, *ctx.arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, input, weight, bias = ctx.saved_tensors
        normalized_ndim, eps, center, weight_offset, *wanted, _ = ctx.arguments

        def plain(grad_output: Tensor, input: Tensor, weight: Tensor | None) -> list[Tensor]:
            gradients = reference.norm_backward(
                grad_output, input, weight, bias, normalized_ndim, eps, center, weight_offset
            )
            return [gradient for gradient, want in zip(gradients, wanted, strict=True) if want]

        incoming = [gradient for gradient, want in zip(grad_gradients, wanted, strict=True) if want]
        second = autograd.pullback(plain, (grad_output, input, weight), incoming)
        return second[0], second[1], None, second[2], *[None] * 9

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        grad_output, input, statistics, weight, bias, *arguments = inputs
        normalized_ndim, eps, center, weight_offset, _, need_weight, need_bias, _ = arguments
        if need_weight or need_bias or in_dims[3] is not None or in_dims[4] is not None:

            def plain(
                grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None
            ) -> tuple[Tensor, Tensor, Tensor]:
                return reference.norm_backward(
                    grad_output, input, weight, bias, normalized_ndim, eps, center, weight_offset
                )

            dims = (in_dims[0], in_dims[1], in_dims[3], in_dims[4])
            return torch.vmap(plain, dims)(grad_output, input, weight, bias), (0, 0, 0)
        grad_output = autograd.batch_first(grad_output, in_dims[0], info.batch_size)
        input = autograd.batch_first(input, in_dims[1], info.batch_size)
        rows = autograd.batch_first(statistics, in_dims[2], info.batch_size).movedim(0, 1).flatten(1)
        gradients = NormBackward.apply(grad_output, input, rows, weight, bias, *arguments)
        return gradients, (0, None, None)
