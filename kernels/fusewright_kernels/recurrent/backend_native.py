"""What the compiled recurrent kernels take, and when they are there. They attach to the ops from C++."""

from fusewright_kernels import native
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.dispatch import Call


def refuse_projection(call: Call) -> str | None:
    return "a projection of the hidden state (weight_hr) has no CUDA kernel"


def refuse_cuda(call: Call) -> str | None:
    if call.device_type != "cuda":
        return f"tensors are on {call.device_type}"
    if call.dtypes[0] not in LOW_PRECISION:
        return f"dtype {call.dtypes[0]} has no CUDA kernel"
    return native.cuda_unavailable_reason()
