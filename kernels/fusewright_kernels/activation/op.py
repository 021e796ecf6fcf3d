"""SwiGLU and GELU with a bias: checks, dispatch, autograd."""

from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, row_kernels
from fusewright_kernels.activation import backend_reference, backend_triton, reference
from fusewright_kernels.activation.function import BiasGELU, SwiGLU
from fusewright_kernels.checks import floating_tensor, same_device, type_error, value_error

backend_reference.attach()
dispatch.register(
    "swiglu", {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": row_kernels.refuse_cpu}
)
dispatch.register(
    "bias_gelu", {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": row_kernels.refuse_cpu}
)

APPROXIMATIONS = ("none", "tanh")


def swiglu(gate: Tensor, up: Tensor | None, backend: str | None) -> Tensor:
    """See :func:`fusewright.functional.swiglu`."""
    floating_tensor("gate", gate)
    if gate.ndim == 0:
        raise value_error("gate.ndim", 0, "at least 1")
    if up is None:
        if gate.shape[-1] % 2 != 0:
            raise value_error("gate.shape[-1]", gate.shape[-1], "an even number: gate and up, one behind the other")
    else:
        floating_tensor("up", up)
        same_device("up", up, "gate", gate)
        if up.shape != gate.shape:
            raise value_error("up.shape", tuple(up.shape), f"gate's shape {tuple(gate.shape)}")
        if up.dtype is not gate.dtype:
            raise type_error("up.dtype", up.dtype, f"{gate.dtype}, the dtype of gate")
    chosen = dispatch.choose("swiglu", dispatch.device_type(gate), (gate.dtype,), gate.ndim, backend)
    if chosen == "reference":
        return reference.swiglu(gate, up)
    if autograd.derivative_possible(gate, up):
        return autograd.apply(SwiGLU, gate, up, chosen)
    return library.overload("swiglu_forward", chosen)(gate, up)


def bias_gelu(input: Tensor, bias: Tensor | None, approximate: str, backend: str | None) -> Tensor:
    """See :func:`fusewright.functional.bias_gelu`."""
    floating_tensor("input", input)
    if input.ndim == 0:
        raise value_error("input.ndim", 0, "at least 1")
    if approximate not in APPROXIMATIONS:
        raise value_error("approximate", repr(approximate), f"one of {', '.join(APPROXIMATIONS)}")
    if bias is not None:
        floating_tensor("bias", bias)
        same_device("bias", bias, "input", input)
        if tuple(bias.shape) != (input.shape[-1],):
            raise value_error("bias.shape", tuple(bias.shape), f"({input.shape[-1]},), input's last size")
    dtypes = (input.dtype,) if bias is None else (input.dtype, bias.dtype)
    chosen = dispatch.choose("bias_gelu", dispatch.device_type(input), dtypes, input.ndim, backend)
    tanh = approximate == "tanh"
    if chosen == "reference":
        return reference.bias_gelu(input, bias, tanh)
    if autograd.derivative_possible(input, bias):
        return autograd.apply(BiasGELU, input, bias, tanh, chosen)
    return library.overload("bias_gelu_forward", chosen)(input, bias, tanh)
