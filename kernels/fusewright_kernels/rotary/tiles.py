"""Tile sizes of the Triton kernel of rotary position embedding."""

from fusewright_kernels.triton_support import Tile, next_power_of_2

SHORTEST_BLOCK_N = 16
LONGEST_BLOCK_N = 256
# Pairs that a program holds: 4 warps with 8 pairs, one 16-byte load of bf16 for either element, a thread.
_PAIRS = 1024


def tile(pairs: int) -> Tile:
    """``block_n`` counts pairs."""
    block_n = min(max(next_power_of_2(max(pairs, 1)), SHORTEST_BLOCK_N), LONGEST_BLOCK_N)
    return Tile(_PAIRS // block_n, block_n, 4, whole_rows=pairs <= block_n)
