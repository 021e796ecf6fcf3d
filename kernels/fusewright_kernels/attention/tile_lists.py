"""Which tiles a kernel visits under a block mask: lists made of the mask by a few small tensor operations."""

import torch
from torch import Tensor


def visited_tiles(block_mask: Tensor, block_size: int, lengths: tuple[int, int], sizes: tuple[int, int]) -> Tensor:
    """Bool (1 or H, tiles of queries, tiles of keys): whether a tile has a pair of a visible block.

    ``lengths`` are those of queries and keys, ``sizes`` those of a tile.
    """
    # Visible blocks above and to the left of each corner; a tile's own are a difference of four.
    counts = torch.nn.functional.pad(block_mask.to(torch.int32).cumsum(1).cumsum(2), (1, 0, 1, 0))
    (top, bottom), (left, right) = _first_and_last(lengths, sizes, block_mask.device)
    rows = counts[:, bottom // block_size + 1] - counts[:, top // block_size]
    return rows[:, :, right // block_size + 1] > rows[:, :, left // block_size]


def tiles_in_window(
    lengths: tuple[int, int], sizes: tuple[int, int], shift: int, before: int, after: int, device: torch.device
) -> Tensor:
    """Bool (tiles of queries, tiles of keys): whether some key j and query i have -before <= j - i - shift <= after."""
    (top, bottom), (left, right) = _first_and_last(lengths, sizes, device)
    return (left[None, :] - bottom[:, None] - shift <= after) & (right[None, :] - top[:, None] - shift >= -before)


def lists_of(visited: Tensor) -> tuple[Tensor, Tensor]:
    """int32 (heads, rows) how many tiles a row visits, and int32 (heads, rows, tiles) their numbers, in order."""
    numbers = torch.sort(visited.to(torch.uint8), dim=-1, descending=True, stable=True).indices
    return visited.sum(-1, dtype=torch.int32).contiguous(), numbers.to(torch.int32).contiguous()


def _first_and_last(
    lengths: tuple[int, int], sizes: tuple[int, int], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """First and last position of each tile, of queries and of keys."""
    firsts = [torch.arange(0, length, size, device=device) for length, size in zip(lengths, sizes, strict=True)]
    return [
        (first, (first + size).clamp(max=length) - 1)
        for first, length, size in zip(firsts, lengths, sizes, strict=True)
    ]
