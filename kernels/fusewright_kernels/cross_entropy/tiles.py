"""Tile sizes of the Triton cross-entropy kernels, by the rules of ``softmax.tiles``: functions of the number of classes
and of whether they lie in the last dimension, never of the number of rows.
"""

from fusewright_kernels.triton_support import Tile, next_power_of_2

SHORTEST_BLOCK_N = 16
LONGEST_BLOCK_N = 2048
# Elements a program holds: 8 warps with 8 each, a 16-byte load of bf16 a thread. With 16 some threads spill.
_ELEMENTS = 2048

# Neighbours in memory belong to different rows where classes are not the last dimension: 32 rows are 64 bytes of bf16.
ACROSS = Tile(32, 32, 8, whole_rows=False)


def tile(columns: int, last_dim: bool) -> Tile:
    if not last_dim:
        return ACROSS
    block_n = min(max(next_power_of_2(columns), SHORTEST_BLOCK_N), LONGEST_BLOCK_N)
    return Tile(_ELEMENTS // block_n, block_n, 8, whole_rows=columns <= block_n)
