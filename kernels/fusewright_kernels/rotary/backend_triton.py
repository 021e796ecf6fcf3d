"""Launchers of the Triton kernel of rotary position embedding; shapes and dtypes are in the schemas of ``library``."""

from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.rotary import tiles
from fusewright_kernels.row_layout import operand_arguments, trailing_rows
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, ceil_div, launching_on
from fusewright_kernels.triton_support import refuse as refuse


def rotary_forward(
    input: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    output = library.in_layout_of(input, input.shape)
    _launch(input, cos, sin, positions, interleaved, inverse, output)
    return output


def rotary_in_place(
    input: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    _launch(input, cos, sin, positions, interleaved, inverse, input)


def _launch(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    output: Tensor,
) -> None:
    if input.numel() == 0:
        return
    from fusewright_kernels.rotary import triton_kernels as kernels

    # Four dimensions are three of rows and one of columns: nothing is ever copied.
    layout = trailing_rows([input, output], 1)
    columns, pairs = input.shape[3], cos.shape[2]
    rows = input.numel() // columns
    tile = tiles.tile(pairs)
    with launching_on(input):
        kernels.rotary_forward_kernel[(ceil_div(rows, tile.block_m),)](
            **operand_arguments("input", layout.operands[0]),
            **operand_arguments("output", layout.operands[1]),
            p_cos=cos.contiguous(),
            p_sin=sin.contiguous(),
            p_positions=None if positions is None else positions.contiguous(),
            M=rows,
            N=columns,
            size_1=layout.sizes[0],
            size_2=layout.sizes[1],
            heads=input.shape[1],
            length=input.shape[2],
            table_rows=cos.shape[1],
            table_stride=0 if cos.shape[0] == 1 else cos.shape[1] * pairs,
            direction=-1.0 if inverse else 1.0,
            R=pairs,
            INTERLEAVED=interleaved,
            COPY_REST=output is not input and 2 * pairs < columns,
            ROW_DIMS=layout.row_dims,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **LAUNCH_OPTIONS,
        )


for _op in (rotary_forward, rotary_in_place):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
