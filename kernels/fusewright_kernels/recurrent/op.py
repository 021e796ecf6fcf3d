"""Recurrent layers and cells: checks, dispatch, autograd."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, cpu_kernels, dispatch, library
from fusewright_kernels.checks import type_error, value_error
from fusewright_kernels.recurrent import backend_native, backend_reference, backend_triton, checks, variants
from fusewright_kernels.recurrent.bidirectional import Bidirectional
from fusewright_kernels.recurrent.function import Recurrent, run
from fusewright_kernels.recurrent.layer import Weights as Weights
from fusewright_kernels.recurrent.layer import inputs_of, joined
from fusewright_kernels.recurrent.variants import Variation as Variation

backend_reference.attach()
dispatch.register("recurrent", {"cuda": backend_native.refuse_cuda, "cpu": cpu_kernels.refuse})
dispatch.register("projected_recurrent", {"cuda": backend_native.refuse_projection, "cpu": cpu_kernels.refuse})
dispatch.register("varied_recurrent", {})
dispatch.register(
    "recurrent_cell",
    {"cuda": backend_native.refuse_cuda, "triton": backend_triton.refuse, "cpu": cpu_kernels.refuse},
)


def recurrent(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    backend: str | None,
    family: str = "recurrent",
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and c_n (empty but for an LSTM) of one layer; see :func:`fusewright.functional.lstm`.

    ``family`` is what its backends are registered as.
    """
    if not isinstance(reverse, bool):
        raise type_error("reverse", f"a {type(reverse).__name__}", "a bool")
    for name, tensor in (("input", input), ("weight_ih", weights.weight_ih), ("weight_hh", weights.weight_hh)):
        if not isinstance(tensor, Tensor):
            raise type_error(name, f"a {type(tensor).__name__}", "a torch.Tensor")
    if input.ndim == 3:
        projection = weights.weight_hr
        h0 = checks.state("h0", h0, input, weights.weight_hh.shape[-1] if projection is None else projection.shape[0])
        if cell == "lstm":
            c0 = checks.state("c0", c0, input, weights.weight_hh.shape[0] // library.CELL_GATES[cell])
    if c0 is not None and c0 is h0 and torch.compiler.is_compiling():
        c0 = c0.view_as(c0)  # Dynamo refuses a function that is given one tensor twice, as torch.nn.LSTMCell gives it
    input, h0, c0, *tensors = _under_autocast(input, h0, c0, *weights)
    weights = Weights(*tensors)
    checks.operands(library.CELL_GATES[cell], input, h0, c0, weights)
    chosen = _choose(family, input, weights, backend)
    masks = checks.lengths(lengths, input), checks.resets(resets, input)
    return _run(chosen, input, h0, c0, *weights, *masks, cell, reverse)


def bidirectional(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    forward: Weights,
    reverse: Weights,
    lengths: Tensor | None,
    resets: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of both directions at once where a kernel does that: as two of :func:`recurrent`, to the bit.

    States are (2, B, H), the output (T, B, 2 H) has the directions next to each other.
    """
    for name, tensor in (("h0", h0), ("c0", c0))[: 2 if cell == "lstm" else 1]:
        if not isinstance(tensor, Tensor):
            raise type_error(name, f"a {type(tensor).__name__}", "a torch.Tensor")
        if tensor.ndim != 3 or len(tensor) != 2:
            raise value_error(f"{name}.shape", tuple(tensor.shape), "(2, B, H)")
    if c0 is not None and c0 is h0 and torch.compiler.is_compiling():
        c0 = c0.view_as(c0)
    input, h0, c0, *tensors = _under_autocast(input, h0, c0, *forward, *reverse)
    forward, reverse = Weights(*tensors[: len(forward)]), Weights(*tensors[len(forward) :])
    for direction, weights in enumerate((forward, reverse)):
        states = h0[direction], None if c0 is None else c0[direction]
        checks.operands(library.CELL_GATES[cell], input, *states, weights)
    chosen = _choose("recurrent", input, forward, backend)
    masks = checks.lengths(lengths, input), checks.resets(resets, input)
    arguments = (input, h0, c0, *forward, *reverse, *masks, cell)
    if chosen != "cpu":
        output, h_n, c_n = joined(*(_run(chosen, *own) for own in inputs_of(*arguments)))
    elif autograd.derivative_possible(input, h0, c0, *forward, *reverse):
        output, h_n, c_n, *_ = autograd.apply(Bidirectional, *arguments, chosen)
    else:
        output, h_n, c_n, *_ = run("bidirectional_forward", chosen, *arguments, False)
    return output, h_n, c_n


def _choose(family: str, input: Tensor, weights: Weights, backend: str | None) -> str:
    family = family if weights.weight_hr is None else "projected_recurrent"
    return dispatch.choose(family, dispatch.device_type(input), (input.dtype,), input.ndim, backend)


def _run(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of ``recurrent_forward`` but the last -> output, h_n, c_n."""
    if autograd.derivative_possible(*arguments[: 3 + len(Weights._fields)]):
        return autograd.apply(Recurrent, *arguments, backend)[:3]
    output, h_n, c_n, *_ = run("recurrent_forward", backend, *arguments, False)
    return output, h_n, c_n


def varied_recurrent(
    cell: str,
    variation: Variation,
    training: bool,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Output, h_n and an LSTM's c_n of a layer with a :class:`Variation`, by the plain formula."""
    input, h0, c0, *tensors = _under_autocast(input, h0, c0, *weights)
    weights = Weights(*tensors)
    checks.operands(library.CELL_GATES[cell], input, h0, c0, weights)
    dispatch.choose("varied_recurrent", dispatch.device_type(input), (input.dtype,), input.ndim)
    masks = checks.lengths(lengths, input), checks.resets(resets, input)
    device_type = input.device.type
    castable = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if castable else nullcontext():
        output, h_n, c_n = variants.run(variation, training, input, h0, c0, weights, *masks, cell, reverse)
    return (output, h_n) if c_n is None else (output, h_n, c_n)


def recurrent_cell(
    cell: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Weights,
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
        cell, sequence, states["h"], states["c"], weights, None, None, False, backend, "recurrent_cell"
    )
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
