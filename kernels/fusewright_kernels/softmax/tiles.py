"""Tile sizes of the Triton softmax kernels, chosen as in ``normalization.tiles``.

They depend on the row length and on whether the softmax dimension is the last, never on the number of rows, so that a
row's bits do not depend on its batch.
"""

from fusewright_kernels.triton_support import Tile, next_power_of_2

SHORTEST_BLOCK_N = 16

# The longest row whose values stay in registers; where columns are not adjacent, each element has a 64-bit address of
# its own besides.
ROW_LIMIT, STRIDED_ROW_LIMIT = 16384, 8192

# Elements a program holds at least: 4 warps with 16 each, two 16-byte loads of bf16 a thread.
_SMALLEST_TILE = 2048

LOOP = Tile(1, 4096, 8, whole_rows=False)
STRIDED_LOOP = Tile(1, 2048, 8, whole_rows=False)

# Softmax along a dimension that is not the last: neighbours in memory belong to different rows, so a tile needs many
# rows for full cache lines. 32 rows are 64 bytes of bf16.
ACROSS_ROWS = 32
ACROSS_ROW_LIMIT = 64
ACROSS_LOOP = Tile(ACROSS_ROWS, 64, 8, whole_rows=False)


def tile(columns: int, last_dim: bool, unit_columns: bool) -> Tile:
    """For forward and backward alike: both hold few values an element, and a row should fare the same in both."""
    if not last_dim:
        return _tile(columns, ACROSS_ROW_LIMIT, ACROSS_ROWS, 8, ACROSS_LOOP)
    if unit_columns:
        return _tile(columns, ROW_LIMIT, 1, 16, LOOP)
    return _tile(columns, STRIDED_ROW_LIMIT, 1, 8, STRIDED_LOOP)


def _tile(columns: int, row_limit: int, smallest_block_m: int, elements_per_thread: int, loop: Tile) -> Tile:
    block_n = max(next_power_of_2(columns), SHORTEST_BLOCK_N)
    if block_n > row_limit:
        return loop
    block_m = max(_SMALLEST_TILE // block_n, smallest_block_m)
    return Tile(block_m, block_n, max(4, block_m * block_n // (32 * elements_per_thread)), whole_rows=True)
