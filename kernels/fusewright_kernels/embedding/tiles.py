"""The tile of the Triton kernels of the embedding."""

from fusewright_kernels.triton_support import Tile, next_power_of_2


def tile(columns: int) -> Tile:
    """Few rows of many columns: each row lies elsewhere, its columns side by side."""
    block_n = min(max(next_power_of_2(columns), 32), 512)
    return Tile(max(1, 2048 // block_n), block_n, 4, whole_rows=columns <= block_n)
