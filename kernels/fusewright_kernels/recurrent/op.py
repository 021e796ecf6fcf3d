"""Recurrent layers and cells: checks, dispatch, autograd."""

from contextlib import nullcontext

import torch
from torch import Tensor

from fusewright_kernels import autograd, cpu_kernels, dispatch, library
from fusewright_kernels.checks import type_error, value_error
from fusewright_kernels.recurrent import backend_native, backend_reference, checks, variants
from fusewright_kernels.recurrent.function import Recurrent, run
from fusewright_kernels.recurrent.variants import Variation as Variation

backend_reference.attach()
dispatch.register("recurrent", {"cuda": backend_native.refuse_cuda, "cpu": cpu_kernels.refuse})
dispatch.register("projected_recurrent", {"cuda": backend_native.refuse_projection, "cpu": cpu_kernels.refuse})
dispatch.register("varied_recurrent", {})


def recurrent(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and c_n (empty but for an LSTM) of one layer; see :func:`fusewright.functional.lstm`."""
    if not isinstance(reverse, bool):
        raise type_error("reverse", f"a {type(reverse).__name__}", "a bool")
    for name, tensor in (("input", input), ("weight_ih", weight_ih), ("weight_hh", weight_hh)):
        if not isinstance(tensor, Tensor):
            raise type_error(name, f"a {type(tensor).__name__}", "a torch.Tensor")
    if input.ndim == 3:
        h0 = checks.state("h0", h0, input, weight_hh.shape[-1] if weight_hr is None else weight_hr.shape[0])
        if cell == "lstm":
            c0 = checks.state("c0", c0, input, weight_hh.shape[0] // library.CELL_GATES[cell])
    if c0 is not None and c0 is h0 and torch.compiler.is_compiling():
        c0 = c0.view_as(c0)  # Dynamo refuses a function that is given one tensor twice, as torch.nn.LSTMCell gives it
    tensors = _under_autocast(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    checks.operands(library.CELL_GATES[cell], *tensors)
    dtype = tensors[0].dtype
    family = "recurrent" if weight_hr is None else "projected_recurrent"
    chosen = dispatch.choose(family, dispatch.device_type(input), (dtype,), input.ndim, backend)
    arguments = (*tensors, checks.lengths(lengths, input), checks.resets(resets, input), cell, reverse)
    if autograd.derivative_possible(*tensors):
        return autograd.apply(Recurrent, *arguments, chosen)[:3]
    output, h_n, c_n, *_ = run("recurrent_forward", chosen, *arguments, False)
    return output, h_n, c_n


def varied_recurrent(
    cell: str,
    variation: Variation,
    training: bool,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Output, h_n and an LSTM's c_n of a layer with a :class:`Variation`, by the plain formula."""
    tensors = _under_autocast(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    checks.operands(library.CELL_GATES[cell], *tensors)
    dispatch.choose("varied_recurrent", dispatch.device_type(input), (tensors[0].dtype,), input.ndim)
    masks = checks.lengths(lengths, input), checks.resets(resets, input)
    device_type = input.device.type
    castable = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if castable else nullcontext():
        output, h_n, c_n = variants.run(*(variation, training, *tensors, *masks, cell, reverse))
    return (output, h_n) if c_n is None else (output, h_n, c_n)


def recurrent_cell(
    cell: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The states after one step, of (B, I) or (I,): see :func:`fusewright.functional.lstm_cell`."""
    if not isinstance(input, Tensor):
        raise type_error("input", f"a {type(input).__name__}", "a torch.Tensor")
    if input.ndim not in (1, 2):
        raise value_error("input.ndim", input.ndim, "1 or 2: (I,) or (B, I)")
    single = input.ndim == 1
    states = {"h": h, "c": c}
    for name, state in states.items():
        if isinstance(state, Tensor):
            if state.ndim != input.ndim:
                raise value_error(f"{name}.ndim", state.ndim, f"{input.ndim}, that of input")
            states[name] = state.unsqueeze(0) if single else state
    sequence = input.reshape(1, 1, -1) if single else input.unsqueeze(0)
    _, h_n, c_n = recurrent(
        cell, sequence, states["h"], states["c"], weight_ih, weight_hh, bias_ih, bias_hh, None, None, None, False,
        backend,
    )  # fmt: skip
    if single:
        return h_n.squeeze(0), c_n.squeeze(0) if cell == "lstm" else c_n
    return h_n, c_n


def _under_autocast(*tensors: Tensor | None) -> tuple:
    """Mirror of torch's autocast, which runs recurrent layers in the low-precision type on every device."""
    first = tensors[0]
    assert first is not None
    device_type = first.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(
        tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in castable else tensor for tensor in tensors
    )


def pair_of_states(hx: object) -> tuple[Tensor | None, Tensor | None]:
    """An LSTM's (h, c), both None where ``hx`` is."""
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)):
        raise type_error("hx", f"a {type(hx).__name__}", "a pair of tensors (h, c)")
    if len(hx) != 2:
        raise value_error("len(hx)", len(hx), "2: (h, c)")
    return hx[0], hx[1]
