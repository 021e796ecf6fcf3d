"""What the compiled recurrent kernels take, and when they are there. They attach to the ops from C++."""

import torch

from fusewright_kernels import native
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.dispatch import Call


def refuse_cpu(call: Call) -> str | None:
    if call.device_type != "cpu":
        return f"tensors are on {call.device_type}"
    for dtype in call.dtypes:
        if dtype not in (torch.float32, *LOW_PRECISION):
            return f"dtype {dtype} has no compiled kernel"
    return native.cpu_unavailable_reason()


def refuse_projection(call: Call) -> str | None:
    return "a projection of the hidden state (weight_hr) has no compiled kernel"
