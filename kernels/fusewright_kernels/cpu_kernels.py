"""What the compiled CPU kernels take, and when they are there. They attach to the ops from C++."""

import torch

from fusewright_kernels import native
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.dispatch import Call

DTYPES = (torch.float32, *LOW_PRECISION)


def refuse(call: Call, *others: torch.dtype) -> str | None:
    """Why the kernels cannot serve ``call``, or None; ``others`` are dtypes taken beside the kernels' own."""
    if call.device_type != "cpu":
        return f"tensors are on {call.device_type}"
    for dtype in call.dtypes:
        if dtype not in (*DTYPES, *others):
            return f"dtype {dtype} has no compiled kernel"
    return native.cpu_unavailable_reason()
