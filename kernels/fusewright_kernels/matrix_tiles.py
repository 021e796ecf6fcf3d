"""What the tile tables of the Triton kernels that multiply have in common, and how a launch takes a tile.

Tiles are functions of dtype, widths and architecture alone, never of lengths or batch, so that a row's bits do not
depend on what it is computed with. No autotuning: a first call would wait seconds for it. The compile check reads the
spills and the shared memory of every tile.
"""

import functools
from typing import Any, NamedTuple

import torch

from fusewright_kernels.triton_support import LAUNCH_OPTIONS, next_power_of_2

# Stated because the assembler otherwise holds some kernels to 128 registers and spills a few.
REGISTER_OPTIONS = {"maxnreg": 255}

# Architectures with tiles of their own; a GPU takes the newest that is not newer than it. sm_80 stands for every GPU
# whose programs may have no more than 99 KiB of shared memory, sm_90 for those with 227 KiB.
ARCHITECTURES = (80, 90)
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}

NARROWEST = 16


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys, and how many columns of their rows a program holds at a time."""

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int


class Shape(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By (architecture, itemsize), then by the widest block of columns that a shape serves.
Shapes = dict[tuple[int, int], dict[int, Shape]]


def padded(width: int) -> int:
    """The power of two, no less than a matrix instruction takes, that holds ``width``."""
    return max(next_power_of_2(max(width, 1)), NARROWEST)


def shape_of(shapes: Shapes, itemsize: int, widest_block: int, architecture: int) -> Shape:
    own = max(known for known in ARCHITECTURES if known <= max(architecture, ARCHITECTURES[0]))
    by_width = shapes.get((own, itemsize)) or shapes[ARCHITECTURES[0], itemsize]
    return by_width[min(width for width in by_width if width >= widest_block)]


@functools.cache
def architecture_of(device: torch.device) -> int:
    """Which column of the tile tables ``device`` takes."""
    if device.type != "cuda":
        return 80
    available = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return max((own for own, needed in SHARED_MEMORY.items() if needed <= available), default=80)


def compile_options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **REGISTER_OPTIONS}


def block_sizes(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "BLOCK_DV": tile.block_dv,
    }


def launch_options(tile: Tile) -> dict[str, Any]:
    return {**block_sizes(tile), **compile_options(tile), **LAUNCH_OPTIONS}
