"""Launch of Triton kernels that work on a tile of rows and columns and know no other."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusewright_kernels.row_layout import operand_arguments, trailing_rows
from fusewright_kernels.triton_support import LAUNCH_OPTIONS, Tile, ceil_div, launching_on


def launch_element_wise(kernel: Any, tile: Tile, operands: Mapping[str, Tensor | None], **arguments: Any) -> None:
    """Launch over all rows and columns of the operands, which have one shape; the first must be present.

    A kernel takes each operand as ``p_<name>`` and its strides, rows and columns as ``M`` and ``N``.
    """
    layout = trailing_rows(list(operands.values()), 1)
    like = next(iter(operands.values()))
    assert like is not None
    columns = like.shape[-1]
    rows = like.numel() // columns
    for name, operand in zip(operands, layout.operands, strict=True):
        arguments |= operand_arguments(name, operand)
    with launching_on(like):
        kernel[(ceil_div(rows, tile.block_m) * ceil_div(columns, tile.block_n),)](
            **arguments,
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
