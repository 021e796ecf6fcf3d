"""What the launchers of the Triton attention kernels share."""

import functools
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels.attention import tiles
from fusewright_kernels.attention.tiles import Tile
from fusewright_kernels.dispatch import Call
from fusewright_kernels.triton_support import DTYPES, INTERPRETED, LAUNCH_OPTIONS, unavailable_reason

# Farther than any two positions lie apart, and twice it still fits 32 bits.
_NO_LIMIT = 2**30


def refuse(call: Call) -> str | None:
    """Why the kernels cannot serve ``call``, or None; they take any widths, lengths and strides, and bool masks."""
    reason = unavailable_reason()
    if reason is not None:
        return reason
    if call.device_type != "cuda" and not (INTERPRETED and call.device_type == "cpu"):
        return f"Triton kernels run on CUDA tensors, not on {call.device_type}"
    for dtype in call.dtypes:
        if dtype.is_floating_point and dtype not in DTYPES:
            return f"the Triton kernels have no {dtype}"
    return None


@functools.cache
def architecture_of(device: torch.device) -> int:
    """Which column of the tile table ``device`` takes."""
    if device.type != "cuda":
        return 80
    available = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return max((own for own, needed in tiles.SHARED_MEMORY.items() if needed <= available), default=80)


def limit(window: int) -> int:
    return _NO_LIMIT if window < 0 else min(window, _NO_LIMIT)


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"stride_{name}_{axis}": tensor.stride(dim) for dim, axis in enumerate(axes)}


def alibi_strides(alibi_slopes: Tensor | None, query: Tensor) -> dict[str, int]:
    if alibi_slopes is None:
        return {"stride_alibi_b": 0, "stride_alibi_h": 0}
    return strides("alibi", alibi_slopes.expand(query.shape[0], -1), "bh")


def launch_options(tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "BLOCK_DV": tile.block_dv,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **tiles.REGISTER_OPTIONS,
        **LAUNCH_OPTIONS,
    }
