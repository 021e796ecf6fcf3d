"""A linear layer that reads its weight once for few rows: checks, dispatch."""

import torch
from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, row_kernels
from fusewright_kernels.checks import floating_tensor, same_device, type_error, value_error
from fusewright_kernels.linear import reference

dispatch.register("linear", {"cpu": row_kernels.refuse_cpu})
library.attach_reference("few_rows_linear", reference.linear)

# Beyond these torch's products win: many rows pay for packing the weight, and a small weight for no second dispatch.
MOST_ROWS = 8
LEAST_WEIGHTS = 1 << 14

# Tensor subclasses have rules for torch's own op and none for ours.
_DENSE = (Tensor, torch.nn.Parameter)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """See :func:`fusewright.functional.linear`."""
    if backend is not None:
        _check(input, weight, bias)
    elif not _is_few_rows(input, weight, bias):
        return torch.nn.functional.linear(input, weight, bias)
    chosen = dispatch.choose("linear", dispatch.device_type(input), (input.dtype,), input.ndim, backend)
    if chosen == "reference":
        return reference.linear(input, weight, bias)
    if backend is not None and autograd.derivative_possible(input, weight, bias):
        raise value_error("backend", repr(chosen), "None where a derivative is wanted or a graph is traced")
    return library.overload("few_rows_linear", chosen)(input, weight, bias)


def _is_few_rows(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel for few rows serves the call; what is wrong with the arguments, torch's own op says."""
    if type(input) not in _DENSE or type(weight) not in _DENSE or not (bias is None or type(bias) in _DENSE):
        return False
    if not (input.is_cpu and weight.is_cpu and weight.ndim == 2 and input.ndim > 0):
        return False
    columns, width = weight.shape
    if input.shape[-1] != width or input.dtype is not weight.dtype:
        return False
    if input.numel() > MOST_ROWS * width or columns * width < LEAST_WEIGHTS:
        return False
    if bias is not None and (bias.shape != (columns,) or bias.dtype is not weight.dtype or not bias.is_cpu):
        return False
    if autograd.derivative_possible(input, weight, bias) or torch.is_autocast_enabled("cpu"):
        return False
    return dispatch.serves("linear", "cpu", (input.dtype,), input.ndim)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    floating_tensor("input", input)
    if input.ndim == 0:
        raise value_error("input.ndim", 0, "at least 1")
    expected = {"weight": (weight, 2, f"(O, {input.shape[-1]})")}
    if bias is not None:
        expected["bias"] = (bias, 1, "(O,), weight's first size")
    for name, (tensor, ndim, shape) in expected.items():
        floating_tensor(name, tensor)
        same_device(name, tensor, "input", input)
        if tensor.dtype is not input.dtype:
            raise type_error(f"{name}.dtype", tensor.dtype, f"{input.dtype}, the dtype of input")
        if tensor.ndim != ndim:
            raise value_error(f"{name}.shape", tuple(tensor.shape), shape)
    if weight.shape[1] != input.shape[-1]:
        raise value_error("weight.shape", tuple(weight.shape), f"(O, {input.shape[-1]})")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise value_error("bias.shape", tuple(bias.shape), f"({weight.shape[0]},)")
