"""Launchers of the Triton normalisation kernels, one per op of ``library``; shapes and dtypes are in its schemas.

Which operands exist is told to a kernel by passing None, which Triton compiles away. No operand is made contiguous
except the rare layouts that ``row_layout`` names.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library, philox
from fusewright_kernels.normalization import tiles
from fusewright_kernels.row_layout import operand_arguments, trailing_rows, vector_operand
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, Tile, ceil_div, launching_on
from fusewright_kernels.triton_support import refuse as refuse


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
    output = input.new_empty(input.shape)
    statistics = library.norm_statistics(input, normalized_ndim, center, save_statistics)
    _forward(
        input, None, weight, bias, None, output, None, statistics,
        normalized_ndim, eps, center, weight_offset, 0.0,
    )  # fmt: skip
    return output, statistics


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
    statistics = library.norm_statistics(input, normalized_ndim, center, save=False)
    _forward(
        input, None, weight, bias, None, output, None, statistics,
        normalized_ndim, eps, center, weight_offset, 0.0,
    )  # fmt: skip


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
    output = input.new_empty(input.shape)
    new_residual = input.new_empty(input.shape, dtype=residual_dtype)
    statistics = library.norm_statistics(input, normalized_ndim, center, save_statistics)
    _forward(
        input, residual, weight, bias, seed, output, new_residual, statistics,
        normalized_ndim, eps, center, weight_offset, dropout_p,
    )  # fmt: skip
    return output, new_residual, statistics


def _forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    new_residual: Tensor | None,
    statistics: Tensor,
    normalized_ndim: int,
    eps: float,
    center: bool,
    weight_offset: float,
    dropout_p: float,
) -> None:
    rows, columns = _rows_and_columns(input, normalized_ndim)
    if input.numel() == 0:
        statistics.fill_(torch.nan)  # of rows without elements
        return
    from fusewright_kernels.normalization import triton_kernels_forward as kernels

    layout = trailing_rows([input, residual], normalized_ndim)
    input_operand, residual_operand = layout.operands
    weight, weight_stride = vector_operand(weight)
    bias, bias_stride = vector_operand(bias)
    tile = tiles.forward_tile(columns, layout.unit_columns)
    kernel = kernels.norm_forward_row_kernel if tile.whole_rows else kernels.norm_forward_loop_kernel
    with launching_on(input):
        kernel[(ceil_div(rows, tile.block_m),)](
            p_weight=weight,
            p_bias=bias,
            p_output=output,
            p_new_residual=new_residual,
            p_statistics=statistics if statistics.numel() else None,
            M=rows,
            N=columns,
            size_1=layout.sizes[0],
            size_2=layout.sizes[1],
            **operand_arguments("input", input_operand),
            **operand_arguments("residual", residual_operand),
            stride_weight=weight_stride,
            stride_bias=bias_stride,
            eps=eps,
            weight_offset=weight_offset,
            **_dropout(seed, dropout_p),
            CENTER=center,
            ROW_DIMS=layout.row_dims,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **LAUNCH_OPTIONS,
        )


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
    grad_input = input.new_empty(input.shape if need_input else (0,))
    grad_weight = _parameter_gradient(weight, need_weight, input)
    grad_bias = _parameter_gradient(bias, need_bias, input)
    _backward(
        grad_output, None, input, statistics, weight, None,
        grad_input if need_input else None, None,
        grad_weight if need_weight and weight is not None else None,
        grad_bias if need_bias and bias is not None else None,
        normalized_ndim, center, weight_offset, 0.0,
    )  # fmt: skip
    return grad_input, grad_weight, grad_bias


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
    shape = new_residual.shape
    grad_input = new_residual.new_empty(shape if need_input else (0,), dtype=input_dtype)
    grad_residual = new_residual.new_empty(shape if need_residual else (0,), dtype=residual_dtype)
    grad_weight = _parameter_gradient(weight, need_weight, new_residual)
    grad_bias = _parameter_gradient(bias, need_bias, new_residual)
    _backward(
        grad_output, grad_new_residual, new_residual, statistics, weight, seed,
        grad_input if need_input else None, grad_residual if need_residual else None,
        grad_weight if need_weight and weight is not None else None,
        grad_bias if need_bias and bias is not None else None,
        normalized_ndim, center, weight_offset, dropout_p,
    )  # fmt: skip
    return grad_input, grad_residual, grad_weight, grad_bias


def _backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    stream: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    grad_input: Tensor | None,
    grad_residual: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    normalized_ndim: int,
    center: bool,
    weight_offset: float,
    dropout_p: float,
) -> None:
    """Fills the gradients that are given; ``stream`` is the normalised tensor."""
    parameter_gradients = [gradient for gradient in (grad_weight, grad_bias) if gradient is not None]
    if stream.numel() == 0:
        for parameter_gradient in parameter_gradients:
            parameter_gradient.zero_()
        return
    rows, columns = _rows_and_columns(stream, normalized_ndim)
    layout = trailing_rows([grad_output, grad_new_residual, stream], normalized_ndim)
    grad_output_operand, grad_new_residual_operand, stream_operand = layout.operands
    weight, weight_stride = vector_operand(weight)
    shared: dict[str, Any] = {
        "p_statistics": statistics.contiguous(),  # a transposed view under vmap
        "M": rows,
        "N": columns,
        "size_1": layout.sizes[0],
        "size_2": layout.sizes[1],
        **operand_arguments("grad_output", grad_output_operand),
        **operand_arguments("stream", stream_operand),
        "CENTER": center,
        "ROW_DIMS": layout.row_dims,
        **LAUNCH_OPTIONS,
    }
    row_wise: dict[str, Any] = {
        "p_weight": weight,
        "p_grad_input": grad_input,
        "p_grad_residual": grad_residual,
        **operand_arguments("grad_new_residual", grad_new_residual_operand),
        "stride_weight": weight_stride,
        "weight_offset": weight_offset,
        **_dropout(seed, dropout_p),
    }
    tile = tiles.backward_tile(columns, layout.unit_columns)
    with launching_on(stream):
        if tile.whole_rows:
            partials = _launch_rows(shared, row_wise, tile, grad_weight, grad_bias)
        else:
            if grad_input is not None or grad_residual is not None:
                _launch_loop(shared, row_wise, tile)
            partials = _launch_parameters(shared, grad_weight, grad_bias) if parameter_gradients else (None, None)
        for partial, gradient in zip(partials, (grad_weight, grad_bias), strict=True):
            if partial is not None and gradient is not None:
                _sum_columns(partial, gradient)


def _launch_rows(
    shared: dict[str, Any],
    row_wise: dict[str, Any],
    tile: Tile,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Every gradient of short rows; returns the partial sums of the parameters'."""
    from fusewright_kernels.normalization import triton_kernels_backward as kernels

    n_blocks = tiles.blocks_per_program(shared["M"], tile)
    programs = ceil_div(shared["M"], n_blocks * tile.block_m)
    partials = _partials(shared, programs, grad_weight, grad_bias)
    kernels.norm_backward_row_kernel[(programs,)](
        **shared,
        **row_wise,
        p_weight_partial=partials[0],
        p_bias_partial=partials[1],
        n_blocks=n_blocks,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    return partials


def _launch_loop(shared: dict[str, Any], row_wise: dict[str, Any], tile: Tile) -> None:
    """The gradients of input and residual of long rows."""
    from fusewright_kernels.normalization import triton_kernels_backward as kernels

    kernels.norm_backward_loop_kernel[(ceil_div(shared["M"], tile.block_m),)](
        **shared, **row_wise, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps
    )


def _launch_parameters(
    shared: dict[str, Any], grad_weight: Tensor | None, grad_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The partial sums of long rows' parameter gradients."""
    from fusewright_kernels.normalization import triton_kernels_backward as kernels

    tile = tiles.PARAMETER
    column_tiles = ceil_div(shared["N"], tile.block_n)
    n_blocks = tiles.blocks_per_program(shared["M"], tile, column_tiles)
    programs = ceil_div(shared["M"], n_blocks * tile.block_m)
    partials = _partials(shared, programs, grad_weight, grad_bias)
    kernels.norm_backward_parameter_kernel[(programs * column_tiles,)](
        **shared,
        p_weight_partial=partials[0],
        p_bias_partial=partials[1],
        n_blocks=n_blocks,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    return partials


def _partials(
    shared: dict[str, Any], programs: int, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """A float32 (programs, N) buffer for each parameter gradient that is wanted."""

    def buffer(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient.new_empty((programs, shared["N"]), dtype=torch.float32)

    return buffer(grad_weight), buffer(grad_bias)


def _sum_columns(partial: Tensor, gradient: Tensor) -> None:
    """Adds the rows of ``partial`` into ``gradient``, in as many levels as keep every run short."""
    from fusewright_kernels.normalization import triton_kernels_backward as kernels

    columns = partial.shape[1]
    column_tiles = ceil_div(columns, tiles.COLUMN_SUM_BLOCK_N)
    while True:
        groups = ceil_div(partial.shape[0], tiles.COLUMN_SUM_GROUP)
        target = gradient if groups == 1 else partial.new_empty((groups, columns))
        kernels.norm_backward_column_sum_kernel[(groups * column_tiles,)](
            p_partial=partial,
            p_sum=target,
            P=partial.shape[0],
            N=columns,
            GROUP=tiles.COLUMN_SUM_GROUP,
            BLOCK_P=tiles.COLUMN_SUM_BLOCK_P,
            BLOCK_N=tiles.COLUMN_SUM_BLOCK_N,
            num_warps=tiles.COLUMN_SUM_WARPS,
            **LAUNCH_OPTIONS,
        )
        if groups == 1:
            return
        partial = target


def _rows_and_columns(tensor: Tensor, normalized_ndim: int) -> tuple[int, int]:
    row_ndim = tensor.ndim - normalized_ndim
    return tensor.shape[:row_ndim].numel(), tensor.shape[row_ndim:].numel()


def _parameter_gradient(parameter: Tensor | None, wanted: bool, stream: Tensor) -> Tensor:
    """A contiguous buffer, without elements for an absent parameter or a gradient not asked for."""
    if parameter is None:
        return stream.new_empty((0,))
    return parameter.new_empty(parameter.shape if wanted else (0,))


def _dropout(seed: Tensor | None, dropout_p: float) -> dict[str, Any]:
    if dropout_p == 0.0:
        return {"p_seed": None, "keep_threshold": 0, "keep_scale": 1.0}
    return {
        "p_seed": seed,
        "keep_threshold": philox.keep_threshold(dropout_p),
        "keep_scale": philox.keep_scale(dropout_p),
    }


for _op in (norm_forward, norm_forward_out, norm_backward, add_norm_forward, add_norm_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
