"""The default overload of each op: the plain formula in the shape of the op's schema."""

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.normalization import reference
from fusewright_kernels.normalization.add_norm_function import keep_mask_of


def _asked_for(gradient: Tensor, wanted: bool) -> Tensor:
    return gradient.contiguous() if wanted else gradient.new_empty((0,))


def _parameter_gradient(gradient: Tensor, parameter: Tensor | None, wanted: bool, input: Tensor) -> Tensor:
    return input.new_empty((0,)) if parameter is None else _asked_for(gradient, wanted)


def norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
    save_statistics: bool,
) -> tuple[Tensor, Tensor]:
    output, statistics = reference.norm_with_statistics(
        input, weight, bias, normalized_ndim, eps, center, weight_offset
    )
    return output.contiguous(), statistics if save_statistics else statistics.new_empty((0,))


def norm_forward_out(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
    output: Tensor,
) -> None:
    output.copy_(reference.norm(input, weight, bias, normalized_ndim, eps, center, weight_offset))


def norm_backward(
    grad_output: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    center: bool,
    weight_offset: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = reference.norm_backward_from_statistics(
        grad_output, input, statistics, weight, bias, normalized_ndim, center, weight_offset
    )
    return (
        _asked_for(grad_input, need_input),
        _parameter_gradient(grad_weight, weight, need_weight, input),
        _parameter_gradient(grad_bias, bias, need_bias, input),
    )


def add_norm_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
    dropout_p: float,
    residual_dtype: torch.dtype,
    save_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    keep = keep_mask_of(input, seed, normalized_ndim, dropout_p)
    output, new_residual, statistics = reference.add_norm_with_statistics(
        input, residual, weight, bias, keep, normalized_ndim, eps, center, weight_offset, dropout_p, residual_dtype
    )
    statistics = statistics if save_statistics else statistics.new_empty((0,))
    return output.contiguous(), new_residual.contiguous(), statistics


def add_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    center: bool,
    weight_offset: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input, grad_residual, grad_weight, grad_bias = reference.add_norm_backward_from_statistics(
        grad_output, grad_new_residual, new_residual, statistics, weight, bias,
        keep_mask_of(new_residual, seed, normalized_ndim, dropout_p),
        normalized_ndim, center, weight_offset, dropout_p, input_dtype, residual_dtype,
    )  # fmt: skip
    return (
        _asked_for(grad_input, need_input),
        _asked_for(grad_residual, need_residual),
        _parameter_gradient(grad_weight, weight, need_weight, new_residual),
        _parameter_gradient(grad_bias, bias, need_bias, new_residual),
    )


def attach() -> None:
    for op in (norm_forward, norm_forward_out, norm_backward, add_norm_forward, add_norm_backward):
        library.attach_reference(op.__name__, op)
