"""Argument checks of the recurrent ops. Nothing malformed may reach a kernel, which trusts every size."""

import torch
from torch import Tensor

from fusewright_kernels.checks import FLOATING, floating_tensor, same_device, type_error, value_error
from fusewright_kernels.recurrent.layer import Weights


def operands(
    gates: int,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
) -> None:
    """Types, devices and shapes of one layer: input (T, B, I), ``gates`` gates; sizes as in the op's schema."""
    # One pass for calls that are in order, which pay for every microsecond; what is wrong is told below.
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    if _alike((input, h0, c0, *weights)) and input.ndim == 3 and weight_hh.ndim == 2:
        rows, state = weight_hh.shape
        batch, width = input.shape[1:]
        hidden = rows // gates
        if (
            rows == hidden * gates > 0
            and (state == hidden if weight_hr is None else weight_hr.shape == (state, hidden))
            and weight_ih.shape == (rows, width)
            and h0.shape == (batch, state)
            and (c0 is None or c0.shape == (batch, hidden))
            and (bias_ih is None) == (bias_hh is None)
            and (bias_ih is None or bias_hh is None or bias_ih.shape == bias_hh.shape == (rows,))
        ):
            return
    _refuse_operands(gates, input, h0, c0, weights)


def _alike(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether those that are there are dense tensors of the first one's type and device."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.dtype not in FLOATING:
        return False
    dtype, device = first.dtype, first.device
    for tensor in tensors:
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.dtype is dtype
            and tensor.device == device
            and tensor.layout is torch.strided
        ):
            return False
    return True


def _refuse_operands(
    gates: int,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
) -> None:
    floating_tensor("input", input)
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    named = {"h0": h0, "c0": c0, **weights._asdict()}
    for name, tensor in named.items():
        if tensor is None:
            continue
        floating_tensor(name, tensor)
        if tensor.dtype is not input.dtype:
            raise type_error(f"{name}.dtype", tensor.dtype, f"{input.dtype}, the dtype of input")
        same_device(name, tensor, "input", input)
    if input.ndim != 3:
        raise value_error("input.ndim", input.ndim, "3: (T, B, I)")
    if weight_hh.ndim != 2 or weight_hh.shape[0] == 0 or weight_hh.shape[0] % gates:
        raise value_error("weight_hh.shape", tuple(weight_hh.shape), f"({gates} * hidden, hidden)")
    batch, hidden = input.shape[1], weight_hh.shape[0] // gates
    state = hidden if weight_hr is None else weight_hr.shape[0]
    _shape("weight_hh", weight_hh, (gates * hidden, state))
    _shape("weight_ih", weight_ih, (gates * hidden, input.shape[2]))
    for name in ("bias_ih", "bias_hh"):
        if named[name] is not None:
            _shape(name, named[name], (gates * hidden,))
    if (bias_ih is None) != (bias_hh is None):
        raise value_error("bias_hh" if bias_hh is None else "bias_ih", None, "both biases or neither")
    if weight_hr is not None:
        _shape("weight_hr", weight_hr, (state, hidden))
    _shape("h0", h0, (batch, state))
    if c0 is not None:
        _shape("c0", c0, (batch, hidden))


def _shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise value_error(f"{name}.shape", tuple(tensor.shape), f"{expected}")


def state(name: str, tensor: Tensor | None, input: Tensor, width: int) -> Tensor:
    """``tensor``, or zeros (B, width) where it is None."""
    if tensor is None:
        return input.new_zeros((input.shape[1], width))
    if not isinstance(tensor, Tensor):
        raise type_error(name, f"a {type(tensor).__name__}", "a torch.Tensor or None")
    return tensor


def lengths(value: Tensor | None, input: Tensor) -> Tensor | None:
    """Lengths as int64 on the input's device, each in [0, T].

    On a GPU the values are checked there, without waiting: a breach is a device-side assertion.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise type_error("lengths", f"a {type(value).__name__}", "a torch.Tensor or None")
    if value.dtype not in (torch.int32, torch.int64):
        raise type_error("lengths.dtype", value.dtype, "torch.int32 or torch.int64")
    steps, batch = input.shape[:2]
    _shape("lengths", value, (batch,))
    sound = ((value >= 0) & (value <= steps)).all()
    if torch.compiler.is_compiling() or value.is_cuda or value.is_meta:
        torch._assert_async(sound, "lengths must lie between 0 and the number of steps of input")
    # A transform's values cannot be read here; the compiled kernels look at them again.
    elif not torch._C._are_functorch_transforms_active() and not sound:
        raise value_error("lengths", value.tolist(), f"lengths in [0, {steps}], the steps of input")
    return value.to(input.device, torch.int64).contiguous()


def resets(value: Tensor | None, input: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise type_error("resets", f"a {type(value).__name__}", "a torch.Tensor or None")
    if value.dtype is not torch.bool:
        raise type_error("resets.dtype", value.dtype, "torch.bool")
    same_device("resets", value, "input", input)
    _shape("resets", value, tuple(input.shape[:2]))
    return value.contiguous()
