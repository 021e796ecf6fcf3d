"""Launchers of the Triton softmax kernels, one per op of ``library``; shapes and dtypes are in its schemas.

Rows run along ``dim`` of any strides. No operand is made contiguous except the rare layouts ``row_layout`` names.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.row_layout import RowLayout, operand_arguments, rows_along
from fusewright_kernels.softmax import tiles
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, Tile, ceil_div, launching_on
from fusewright_kernels.triton_support import refuse as refuse


def softmax_forward(input: Tensor, dim: int, output_dtype: torch.dtype) -> Tensor:
    output = input.new_empty(input.shape, dtype=output_dtype)
    softmax_forward_out(input, dim, output)
    return output


def softmax_forward_out(input: Tensor, dim: int, output: Tensor) -> None:
    if input.numel() == 0:
        return
    from fusewright_kernels.softmax import triton_kernels as kernels

    layout = rows_along([input, output], dim)
    tile = tiles.tile(input.shape[dim], last_dim=dim == input.ndim - 1, unit_columns=layout.unit_columns)
    _launch(
        kernels.softmax_forward_row_kernel if tile.whole_rows else kernels.softmax_forward_loop_kernel,
        tile, layout, ("input", "output"), input, dim,
    )  # fmt: skip


def softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    grad_input = output.new_empty(output.shape, dtype=input_dtype)
    if output.numel() == 0:
        return grad_input
    from fusewright_kernels.softmax import triton_kernels as kernels

    layout = rows_along([grad_output, output, grad_input], dim)
    tile = tiles.tile(output.shape[dim], last_dim=dim == output.ndim - 1, unit_columns=layout.unit_columns)
    _launch(
        kernels.softmax_backward_row_kernel if tile.whole_rows else kernels.softmax_backward_loop_kernel,
        tile, layout, ("grad_output", "output", "grad_input"), output, dim,
    )  # fmt: skip
    return grad_input


def _launch(kernel: Any, tile: Tile, layout: RowLayout, names: tuple[str, ...], like: Tensor, dim: int) -> None:
    """Launch over the rows of ``like`` along ``dim``; ``names`` are those of the layout's operands in the kernel."""
    columns = like.shape[dim]
    rows = like.numel() // columns
    operands: dict[str, Any] = {}
    for name, operand in zip(names, layout.operands, strict=True):
        operands |= operand_arguments(name, operand)
    with launching_on(like):
        kernel[(ceil_div(rows, tile.block_m),)](
            **operands,
            M=rows,
            N=columns,
            size_1=layout.sizes[0],
            size_2=layout.sizes[1],
            ROW_DIMS=layout.row_dims,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **LAUNCH_OPTIONS,
        )


for _op in (softmax_forward, softmax_forward_out, softmax_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
