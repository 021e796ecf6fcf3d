"""What the compiled kernels of linear attention take, and when they are there. They attach to the ops from C++."""

import torch

from fusewright_kernels import native
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.dispatch import Call


def refuse_cpu(call: Call) -> str | None:
    if call.device_type != "cpu":
        return f"tensors are on {call.device_type}"
    if call.dtypes[0] not in (torch.float32, *LOW_PRECISION):
        return f"dtype {call.dtypes[0]} has no compiled kernel"
    return native.cpu_unavailable_reason()
