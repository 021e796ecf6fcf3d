"""Tile sizes of the Triton cross-entropy kernels, by the rules of ``softmax.tiles``: functions of the number of classes
and of whether they lie in the last dimension, never of the number of rows.
"""

from fusewright_kernels.triton_support import Tile, next_power_of_2

SHORTEST_BLOCK_N = 16
LONGEST_BLOCK_N = 4096
# Elements a program holds at least: 4 warps with 16 each, two 16-byte loads of bf16 a thread.
_SMALLEST_TILE = 2048

# Neighbours in memory belong to different rows where classes are not the last dimension: 32 rows are 64 bytes of bf16.
ACROSS = Tile(32, 64, 8, whole_rows=False)


def tile(columns: int, last_dim: bool) -> Tile:
    if not last_dim:
        return ACROSS
    block_n = min(max(next_power_of_2(columns), SHORTEST_BLOCK_N), LONGEST_BLOCK_N)
    block_m = max(_SMALLEST_TILE // block_n, 1)
    return Tile(block_m, block_n, 8 if block_n == LONGEST_BLOCK_N else 4, whole_rows=columns <= block_n)
