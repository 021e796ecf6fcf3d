"""Residual addition fused with normalisation as an ``autograd.Function``; the rules are those of ``norm_function``.

The backward needs neither input nor residual: it works from the new residual, which the forward returns anyway.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library, philox
from fusewright_kernels.normalization import reference


def keep_mask_of(input: Tensor, seed: Tensor | None, normalized_ndim: int, dropout_p: float) -> Tensor | None:
    """Dropout's keep mask in the shape of ``input``, None without dropout."""
    if seed is None or dropout_p == 0.0:
        return None
    rows = input.shape[: input.ndim - normalized_ndim].numel()
    columns = input.shape[input.ndim - normalized_ndim :].numel()
    return philox.keep_mask(seed, rows, columns, dropout_p).reshape(input.shape)


class AddNorm(torch.autograd.Function):
    """(input, residual, seed, weight, bias, ...) -> (output, new_residual, statistics)."""

    @staticmethod
    def forward(
        input: Tensor,
        residual: Tensor,
        seed: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_ndim: int,
        eps: float,
        center: bool,
        weight_offset: float,
        dropout_p: float,
        residual_dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        forward = library.overload("add_norm_forward", backend)
        return forward(
            input, residual, weight, bias, seed,
            normalized_ndim, eps, center, weight_offset, dropout_p, residual_dtype, True,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, residual, seed, weight, bias, *ctx.arguments = inputs
        _, new_residual, statistics = output
        ctx.input_dtypes = (input.dtype, residual.dtype)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(new_residual, statistics, weight, bias, seed)

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_new_residual: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        new_residual, statistics, weight, bias, seed = ctx.saved_tensors
        normalized_ndim, eps, center, weight_offset, dropout_p, _, backend = ctx.arguments
        need_input, need_residual, _, need_weight, need_bias = ctx.needs_input_grad[:5]
        if grad_output is None:
            grad_output = torch.zeros_like(new_residual, dtype=ctx.input_dtypes[0])
        # Without dropout both summands have the same gradient: one tensor serves both where the types agree.
        shared = need_input and need_residual and dropout_p == 0.0 and ctx.input_dtypes[0] is ctx.input_dtypes[1]
        wanted = (need_input and not shared, need_residual, need_weight, need_bias)
        tensors = (grad_output, grad_new_residual, new_residual, statistics, weight, bias, seed)
        if autograd.second_derivative_possible(grad_output, grad_new_residual, new_residual, weight):
            gradients = AddNormBackward.apply(
                *tensors, normalized_ndim, eps, center, weight_offset, dropout_p, *ctx.input_dtypes, *wanted, backend
            )
        else:
            backward = library.overload("add_norm_backward", backend)
            gradients = backward(
                *tensors, normalized_ndim, center, weight_offset, dropout_p, *ctx.input_dtypes, *wanted
            )
        grad_input, grad_residual, grad_weight, grad_bias = autograd.only_wanted(gradients, wanted)
        if shared:
            grad_input = grad_residual
        return grad_input, grad_residual, None, grad_weight, grad_bias, *[None] * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        input, residual, seed, weight, bias, *arguments = inputs
        normalized_ndim, eps, center, weight_offset, dropout_p, residual_dtype, _ = arguments
        # Rows of the kernel draw their own dropout words; samples under vmap with one seed must draw the same.
        if seed is not None or in_dims[3] is not None or in_dims[4] is not None:

            def plain(
                input: Tensor, residual: Tensor, seed: Tensor | None, weight: Tensor | None, bias: Tensor | None
            ) -> tuple[Tensor, Tensor, Tensor]:
                keep = keep_mask_of(input, seed, normalized_ndim, dropout_p)
                return reference.add_norm_with_statistics(
                    input, residual, weight, bias, keep,
                    normalized_ndim, eps, center, weight_offset, dropout_p, residual_dtype,
                )  # fmt: skip

            return torch.vmap(plain, in_dims[:5])(input, residual, seed, weight, bias), (0, 0, 0)
        input = autograd.batch_first(input, in_dims[0], info.batch_size)
        residual = autograd.batch_first(residual, in_dims[1], info.batch_size)
        output, new_residual, statistics = AddNorm.apply(input, residual, seed, weight, bias, *arguments)
        return (output, new_residual, statistics.unflatten(1, (info.batch_size, -1))), (0, 0, 1)


class AddNormBackward(torch.autograd.Function):
    """(grad_output, grad_new_residual, new_residual, ...) -> gradients of input, residual, weight and bias."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        grad_new_residual: Tensor | None,
        new_residual: Tensor,
        statistics: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        normalized_ndim: int,
        eps: float,
        center: bool,
        weight_offset: float,
        dropout_p: float,
        input_dtype: torch.dtype,
        residual_dtype: torch.dtype,
        need_input: bool,
        need_residual: bool,
        need_weight: bool,
        need_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        backward = library.overload("add_norm_backward", backend)
        return backward(
            grad_output, grad_new_residual, new_residual, statistics, weight, bias, seed,
            normalized_ndim, center, weight_offset, dropout_p, input_dtype, residual_dtype,
            need_input, need_residual, need_weight, need_bias,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_output, grad_new_residual, new_residual, _, weight, bias, seed, *ctx.arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, grad_new_residual, new_residual, weight, bias, seed)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *differentiable, bias, seed = ctx.saved_tensors
        wanted = ctx.arguments[7:11]

        def plain(*tensors: Tensor | None) -> list[Tensor]:
            gradients = _plain_backward((*tensors, bias, seed), ctx.arguments)
            return [gradient for gradient, want in zip(gradients, wanted, strict=True) if want]

        incoming = [gradient for gradient, want in zip(grad_gradients, wanted, strict=True) if want]
        second = autograd.pullback(plain, differentiable, incoming)
        return *second[:3], None, second[3], *[None] * 14

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        grad_output, grad_new_residual, new_residual, _, weight, bias, seed, *arguments = inputs
        dims = (*in_dims[:3], *in_dims[4:7])

        def plain(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return _plain_backward(tensors, arguments)

        tensors = (grad_output, grad_new_residual, new_residual, weight, bias, seed)
        return torch.vmap(plain, dims)(*tensors), (0, 0, 0, 0)


def _plain_backward(tensors: tuple[Any, ...], arguments: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference on the tensors and arguments of :class:`AddNormBackward`, statistics left out."""
    grad_output, grad_new_residual, new_residual, weight, bias, seed = tensors
    normalized_ndim, eps, center, weight_offset, dropout_p, input_dtype, residual_dtype, *_ = arguments
    keep = keep_mask_of(new_residual, seed, normalized_ndim, dropout_p)
    return reference.add_norm_backward(
        grad_output, grad_new_residual, new_residual, weight, bias, keep,
        normalized_ndim, eps, center, weight_offset, dropout_p, input_dtype, residual_dtype,
    )  # fmt: skip
