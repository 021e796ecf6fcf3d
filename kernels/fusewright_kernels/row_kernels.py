"""What the compiled row-wise kernels (normalisation, softmax) take, and when they are there.

They attach to their ops from C++, so refusing is all there is to say about them in Python.
"""

import torch

from fusewright_kernels import native
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.dispatch import Call

_DTYPES = (torch.float32, *LOW_PRECISION)
# The kernels' row view holds this many dimensions on each side of the split; see csrc/include/fusewright/row_view.h.
_MOST_DIMENSIONS = 12


def refuse_unless_on(device_type: str, call: Call) -> str | None:
    """Whether the kernels take such a call, wherever the library is."""
    if call.device_type != device_type:
        return f"tensors are on {call.device_type}"
    for dtype in call.dtypes:
        if dtype not in _DTYPES:
            return f"dtype {dtype} has no compiled kernel"
    if call.ndim > _MOST_DIMENSIONS:
        return f"the input has {call.ndim} dimensions, the compiled kernels take {_MOST_DIMENSIONS}"
    return None


def refuse_cpu(call: Call) -> str | None:
    return refuse_unless_on("cpu", call) or native.cpu_unavailable_reason()


def refuse_cuda(call: Call) -> str | None:
    return refuse_unless_on("cuda", call) or native.cuda_unavailable_reason()
