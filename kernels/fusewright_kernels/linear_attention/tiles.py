"""Tiles of the Triton kernels of linear attention; functions of dtype and widths alone, see ``matrix_tiles``."""

from typing import NamedTuple

from fusewright_kernels.matrix_tiles import padded

# Columns held at a time: wider rows and states are cut. Of the tiles tried the largest without a spill.
_WIDEST = 32

# The shortest block of positions between two states that are kept.
_SHORTEST = 64

# Positions whose sums share a state where nobody needs the states between them.
FULL_LENGTH = 512

# Rows and columns of the kernel of row numbers, elements of a state that a program of the scan carries, warps of both.
NUMBER_ROWS, NUMBER_COLUMNS = 32, 128
SCAN_BLOCK = 256
SMALL_WARPS = 4


class Tile(NamedTuple):
    """BLOCK_T positions and the pieces of columns of a program; ``length``: positions of a block between states."""

    block_t: int
    block_d: int
    block_dv: int
    num_warps: int
    length: int


def tile(itemsize: int, d: int, dv: int, causal: bool) -> Tile:
    # No longer a block than makes its state as small as its inputs: products within it grow with its square.
    length = max(_SHORTEST, padded(dv)) if causal else FULL_LENGTH
    block_d, block_dv = (min(padded(width), _WIDEST) for width in (d, dv))
    # Parts of float32 operands take as many registers again.
    return Tile(32 if itemsize == 4 else 64, block_d, block_dv, 8, length)
