"""One layer of an LSTM and of a GRU over whole sequences, and an LSTM over sequences of which half is padding.

Sizes are T, B, I, H: steps, batch, input width, hidden width.
"""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusewright.functional
from fusewright_bench.case import Cost, Forward, Inputs, Operation, Outputs, Provider, Shape, growth
from fusewright_bench.cases import ours
from fusewright_bench.peers import FLASHRNN
from fusewright_kernels.recurrent import reference

_QUICK = frozenset({"quick", "micro"})
_MICRO = frozenset({"micro"})
_MODELS = frozenset({"models"})

_BATCHED = (
    Shape("64x16x256x256", (64, 16, 256, 256), _QUICK),
    Shape("64x64x256x256", (64, 64, 256, 256), _MICRO),
    Shape("64x16x512x512", (64, 16, 512, 512), _MICRO),
    Shape("64x64x512x512", (64, 64, 512, 512), _MICRO),
)
_SINGLE = (
    Shape("64x1x256x256", (64, 1, 256, 256), _QUICK),
    Shape("64x1x512x512", (64, 1, 512, 512), _MICRO),
    Shape("64x1x1024x1024", (64, 1, 1024, 1024), _MICRO),
)
SHAPES = {
    "lstm": (*_BATCHED, *_SINGLE, Shape("awd-lstm", (70, 80, 400, 1152), _MODELS)),
    "gru": (*_BATCHED, *_SINGLE, Shape("deep-speech-2", (256, 8, 800, 800), _MODELS)),
    "padded_lstm": (_BATCHED[0], _BATCHED[3]),
}
SCALING = (
    growth("hidden size", (64, 128, 256, 512, 1024), lambda hidden: (16, 16, hidden, hidden)),
    growth("batch", (1, 4, 16, 64), lambda batch: (16, batch, 256, 256)),
    growth("sequence length", (16, 64, 256), lambda steps: (steps, 16, 256, 256)),
)
TINY = Shape("tiny", (1, 1, 8, 8))

_GATES = {"lstm": 4, "gru": 3, "padded_lstm": 4}
_ACTIVATIONS = {"lstm": 5, "gru": 3}  # a sigmoid or a tanh each, and an exponential each
_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _cell(kind: str) -> str:
    return kind.removeprefix("padded_")


def make_inputs(
    kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    steps, batch, width, hidden = shape.sizes
    gates = _GATES[kind] * hidden

    def weight(*size: int) -> Tensor:
        return (torch.rand(*size, generator=generator) * 2.0 - 1.0) / hidden**0.5

    made = {
        "input": torch.randn(steps, batch, width, generator=generator),
        "h0": torch.randn(batch, hidden, generator=generator),
        "c0": torch.randn(batch, hidden, generator=generator),
        "weight_ih": weight(gates, width), "weight_hh": weight(gates, hidden),
        "bias_ih": weight(gates), "bias_hh": weight(gates),
    }  # fmt: skip
    if kind == "gru":
        del made["c0"]
    inputs = {name: tensor.to(device, dtype) for name, tensor in made.items()}
    if kind == "padded_lstm":
        # Evenly spread from nothing to all steps; half of all steps are padding.
        inputs["lengths"] = torch.linspace(0, steps, batch + 1)[1:].round().long().to(device)
    return inputs


def formula(kind: str, inputs: Inputs) -> Outputs:
    names = ("input", "h0", "c0", *_PARAMETERS, "weight_hr", "lengths", "resets")
    arguments: list[Any] = [*(inputs.get(name) for name in names), _cell(kind), False]
    return (reference.recurrent(*arguments)[0],)


def _torch_layer(kind: str, inputs: Inputs) -> Outputs:
    states = tuple(inputs[name].unsqueeze(0) for name in ("h0", "c0") if name in inputs)
    weights = [inputs[name] for name in _PARAMETERS]
    training = torch.is_grad_enabled() and inputs["input"].requires_grad
    if kind == "padded_lstm":
        packed = pack_padded_sequence(inputs["input"], inputs["lengths"].clamp_min(1).cpu(), enforce_sorted=False)
        order = packed.sorted_indices
        sorted_states = [state if order is None else state.index_select(1, order) for state in states]
        data = torch.lstm(packed.data, packed.batch_sizes, sorted_states, weights, True, 1, 0.0, training, False)[0]
        return (pad_packed_sequence(packed._replace(data=data), total_length=inputs["input"].shape[0])[0],)
    function = getattr(torch, kind)
    state = states if kind == "lstm" else states[0]
    return (function(inputs["input"], state, weights, True, 1, 0.0, training, False, False)[0],)


def _bind_flashrnn(inputs: Inputs) -> Forward:
    """(B, T, G, heads, H) projected inputs, here with one head; its kernels start after the product with the input."""
    flashrnn = import_module("flashrnn").flashrnn
    hidden = inputs["h0"].shape[-1]
    gate_sizes = (_GATES["lstm"], 1, hidden)

    def forward() -> Outputs:
        projected = (inputs["input"] @ inputs["weight_ih"].mT).transpose(0, 1).unflatten(-1, gate_sizes)
        recurrent = inputs["weight_hh"].unflatten(0, gate_sizes)
        bias = (inputs["bias_ih"] + inputs["bias_hh"]).unflatten(0, gate_sizes)
        states = torch.stack([inputs["h0"], inputs["c0"]])[:, :, None, None]
        dtype = str(projected.dtype).removeprefix("torch.")
        return (
            flashrnn(projected, recurrent, bias, states, function="lstm", dtype=dtype)[0][0, :, :, 0].transpose(0, 1),
        )

    return forward


def cost(kind: str, shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """Two products a step forward and four backward; input, output and weights, and their gradients, once each."""
    steps, batch, width, hidden = shape.sizes
    share = 0.5 if kind == "padded_lstm" else 1.0
    gates = _GATES[kind] * hidden
    product = int(2 * steps * batch * gates * (width + hidden) * share)
    elements = int(steps * batch * (width + hidden) * share) + gates * (width + hidden + 2)
    passes = {"fwd": 1, "bwd": 2, "both": 3}[mode]
    activations = _ACTIVATIONS[_cell(kind)] * int(steps * batch * hidden * share)
    exponentials = 0 if mode == "bwd" else activations
    return Cost(passes * product, passes * elements * dtype.itemsize, matrix=True, exponentials=exponentials)


def _declare(kind: str) -> Operation:
    make, plain = partial(make_inputs, kind), partial(formula, kind)
    function = getattr(fusewright.functional, _cell(kind))

    def layer(**keywords: object) -> Outputs:
        return (function(**keywords)[0],)

    def tiny_inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return make(TINY, dtype, device, torch.Generator().manual_seed(0))

    def torch_forward(inputs: Inputs) -> Forward:
        return partial(_torch_layer, kind, inputs)

    def providers(device: torch.device) -> Sequence[Provider]:
        return (
            *ours.providers(device, layer, dict, tiny_inputs, takes_out=False),
            Provider("naive", "reference", lambda inputs: partial(plain, inputs)),
            Provider("torch", "torch", torch_forward),
            ours.compiled(plain),
            *([FLASHRNN.provider(_bind_flashrnn)] if kind == "lstm" else []),
        )

    states = ("h0",) if kind == "gru" else ("h0", "c0")
    return Operation(
        name=kind,
        shapes=SHAPES[kind],
        tiny=TINY,
        make_inputs=make,
        formula=plain,
        providers=providers,
        cost=partial(cost, kind),
        differentiable=("input", *states, *_PARAMETERS),
        outputs=("output",),
        rank=4,
        scaling=SCALING if kind == "lstm" else (),
    )


OPERATIONS = tuple(_declare(kind) for kind in SHAPES)
