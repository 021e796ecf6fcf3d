"""Argument checks with one error style: the argument, its value, what was expected.

The exception classes are also ``RuntimeError``, the class torch's own functions raise, so that code written
against torch keeps catching them.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor

LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ArgumentValueError(ValueError, RuntimeError):
    """An argument has the right type and a value that cannot be served."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument has the wrong type or dtype."""


class ArgumentIndexError(IndexError, ArgumentValueError):
    """An index is out of range, for which torch's own functions raise ``IndexError``."""


def value_error(argument: str, value: object, expected: str) -> ArgumentValueError:
    return ArgumentValueError(f"{argument} is {value}, expected {expected}")


def type_error(argument: str, value: object, expected: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{argument} is {value}, expected {expected}")


def floating_tensor(argument: str, tensor: object) -> None:
    """``tensor`` is a dense floating-point tensor of a supported dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise type_error(argument, f"a {type(tensor).__name__}", "a torch.Tensor")
    if tensor.dtype not in FLOATING:
        raise type_error(f"{argument}.dtype", tensor.dtype, "float32, bfloat16, float16 or float64")
    if tensor.layout is not torch.strided:
        raise type_error(f"{argument}.layout", tensor.layout, "torch.strided")


def same_device(argument: str, tensor: torch.Tensor, other: str, reference: torch.Tensor) -> None:
    if tensor.is_cpu and reference.is_cpu:  # the usual case, for a third of the price of the comparison below
        return
    if tensor.device != reference.device:
        raise value_error(f"{argument}.device", tensor.device, f"{reference.device}, the device of {other}")


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a check may look at what ``tensor`` holds: a GPU would be waited for, a trace or a transform has none."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def probability(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise type_error(argument, f"a {type(value).__name__}", "a float in [0, 1]")
    if not 0.0 <= value <= 1.0:
        raise value_error(argument, value, "a float in [0, 1]")


def seed(argument: str, value: object) -> None:
    """``value`` is None, a 64-bit int, or an integer tensor of one element."""
    if value is None:
        return
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise value_error(f"{argument}.shape", tuple(value.shape), "one element")
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype is torch.bool:
            raise type_error(f"{argument}.dtype", value.dtype, "an integer dtype")
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise type_error(argument, f"a {type(value).__name__}", "an int, an int64 tensor of one element or None")
    if not -(2**63) <= value < 2**63:
        raise value_error(argument, value, "an int of 64 bits")


def output_buffer(out: object, input: torch.Tensor, dtype: torch.dtype) -> None:
    """``out`` can take the result of an element-for-element call on ``input``."""
    if not isinstance(out, torch.Tensor):
        raise type_error("out", f"a {type(out).__name__}", "a torch.Tensor")
    if out.shape != input.shape:
        raise value_error("out.shape", tuple(out.shape), f"input's shape {tuple(input.shape)}")
    if out.dtype is not dtype:
        raise type_error("out.dtype", out.dtype, str(dtype))
    same_device("out", out, "input", input)
    if not out.is_contiguous():
        raise value_error("out.stride()", out.stride(), "contiguous strides")
    if torch.is_grad_enabled() and (out.requires_grad or input.requires_grad):
        raise value_error("out", "given", "None where a gradient is wanted: out= does not support differentiation")
