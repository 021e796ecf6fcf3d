"""Whether Triton can run here, and what every Triton launcher needs. Imports without Triton.

Kernels live in modules that import Triton at their top; launchers import those at the first launch, so that importing
this package costs nothing where Triton is absent or unused.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fusewright_kernels.dispatch import Call

# Under the interpreter kernels are Python and run on CPU tensors. Triton reads the variable when a kernel is defined,
# so it must be set before the first use; these are the spellings that Triton takes for true.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class Tile(NamedTuple):
    """What one program of a row-wise kernel holds at a time: BLOCK_M rows of BLOCK_N columns."""

    block_m: int
    block_n: int
    num_warps: int
    whole_rows: bool  # complete rows; otherwise the kernel loops over columns


DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Floating-point fusion (a * b + c rounded once) is stated because Triton 3.10 changes its default.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


def unavailable_reason() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "Triton needs a GPU, and torch sees none (TRITON_INTERPRET=1 runs the kernels as Python)"
    return None


def refuse(call: Call) -> str | None:
    """Why the kernels cannot serve ``call``, or None; they take any rank, any strides, and bool masks."""
    reason = unavailable_reason()
    if reason is not None:
        return reason
    if call.device_type != "cuda" and not (INTERPRETED and call.device_type == "cpu"):
        return f"Triton kernels run on CUDA tensors, not on {call.device_type}"
    for dtype in call.dtypes:
        if dtype.is_floating_point and dtype not in DTYPES:
            return f"the Triton kernels have no {dtype}"
    return None


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which a launch goes to the device of ``tensor``: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()


def element_wise_tile(columns: int) -> Tile:
    """For kernels that sum nothing: 4 warps with 8 elements, a 16-byte load of bf16, a thread."""
    block_n = min(max(next_power_of_2(columns), 16), 1024)
    return Tile(1024 // block_n, block_n, 4, whole_rows=columns <= block_n)


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """Arguments ``stride_<name>_<axis>`` of a kernel, one for each letter of ``axes``."""
    return {f"stride_{name}_{axis}": tensor.stride(dim) for dim, axis in enumerate(axes)}
