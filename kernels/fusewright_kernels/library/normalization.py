"""Schemas of normalisation: layer and RMS norm, and both with a residual added before."""

import math

import torch
from torch import Tensor

from fusewright_kernels.library.registry import contiguous_like, define, gradient_or_empty


def _parameter_gradient_or_empty(wanted: bool, parameter: Tensor | None, input: Tensor) -> Tensor:
    if parameter is None:
        return input.new_empty((0,))
    return gradient_or_empty(wanted, parameter, parameter.dtype)


def norm_statistics(input: Tensor, normalized_ndim: int, center: bool, save: bool) -> Tensor:
    """Empty statistics of M rows, float32: (2, M) with rstd and mean if ``center``, else (1, M) with rstd.

    ``M`` is the product of the leading sizes. (0,) if they are not to be saved.
    """
    if not save:
        return input.new_empty((0,), dtype=torch.float32)
    rows = math.prod(input.shape[: input.ndim - normalized_ndim])
    return input.new_empty((2 if center else 1, rows), dtype=torch.float32)


# norm: y = (x - mean) * rstd * (weight + weight_offset) + bias over the last normalized_ndim dimensions; layer
# normalisation if center, else RMS normalisation, which has no mean. Weight and bias have the normalised shape.

define(
    "norm_forward",
    "(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps, bool center, float weight_offset,"
    " bool save_statistics) -> (Tensor output, Tensor statistics)",
    lambda input, weight, bias, normalized_ndim, eps, center, weight_offset, save_statistics: (
        contiguous_like(input),
        norm_statistics(input, normalized_ndim, center, save_statistics),
    ),
)

define(
    "norm_forward_out",
    "(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps, bool center, float weight_offset,"
    " Tensor(a!) output) -> ()",
    lambda *args: None,
)


def _norm_backward_fake(
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
    return (
        gradient_or_empty(need_input, input, input.dtype),
        _parameter_gradient_or_empty(need_weight, weight, input),
        _parameter_gradient_or_empty(need_bias, bias, input),
    )


define(
    "norm_backward",
    "(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, int normalized_ndim,"
    " bool center, float weight_offset, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _norm_backward_fake,
)

# add_norm: new_residual = dropout(input) + residual, rounded to residual_dtype, then the norm of it as stored.
# Dropout keeps element i of a row where philox_uint32(seed, row, i) >= dropout_p * 2^32, see philox.py.

define(
    "add_norm_forward",
    "(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, int normalized_ndim, float eps,"
    " bool center, float weight_offset, float dropout_p, ScalarType residual_dtype, bool save_statistics)"
    " -> (Tensor output, Tensor new_residual, Tensor statistics)",
    lambda input, residual, weight, bias, seed, normalized_ndim, eps, center, weight_offset, dropout_p, residual_dtype,
    save_statistics: (
        contiguous_like(input),
        contiguous_like(input, residual_dtype),
        norm_statistics(input, normalized_ndim, center, save_statistics),
    ),
)  # fmt: skip


def _add_norm_backward_fake(
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
    return (
        gradient_or_empty(need_input, new_residual, input_dtype),
        gradient_or_empty(need_residual, new_residual, residual_dtype),
        _parameter_gradient_or_empty(need_weight, weight, new_residual),
        _parameter_gradient_or_empty(need_bias, bias, new_residual),
    )


define(
    "add_norm_backward",
    "(Tensor grad_output, Tensor? grad_new_residual, Tensor new_residual, Tensor statistics, Tensor? weight,"
    " Tensor? bias, Tensor? seed, int normalized_ndim, bool center, float weight_offset, float dropout_p,"
    " ScalarType input_dtype, ScalarType residual_dtype, bool need_input, bool need_residual, bool need_weight,"
    " bool need_bias) -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    _add_norm_backward_fake,
)
