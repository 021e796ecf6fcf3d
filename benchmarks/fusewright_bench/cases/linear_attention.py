"""Causal linear attention, against the formula that writes the matrix of queries and keys.

Sizes are B, H, T, D: batch, heads, length, head dimension.
"""

from collections.abc import Sequence

import torch

import fusewright.functional
from fusewright_bench.case import Cost, Inputs, Operation, Outputs, Provider, Shape, growth
from fusewright_bench.cases import ours
from fusewright_kernels.linear_attention import reference

EPS = 1e-6

SHAPES = (
    Shape("1x4x1024x64", (1, 4, 1024, 64), frozenset({"quick", "micro"})),
    Shape("1x4x4096x64", (1, 4, 4096, 64), frozenset({"micro"})),
)
SCALING = (
    growth("sequence length", (256, 512, 1024, 2048, 4096), lambda length: (1, 2, length, 64)),
    growth("head dimension", (16, 32, 64, 128), lambda width: (1, 2, 1024, width)),
)
TINY = Shape("tiny", (1, 1, 8, 8))


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return {name: torch.randn(shape.sizes, generator=generator).to(device, dtype) for name in ("query", "key", "value")}


def formula(inputs: Inputs) -> Outputs:
    tensors = (inputs["query"], inputs["key"], inputs["value"])
    return (reference.attention(*tensors, None, None, True, EPS, reference.ELU)[0],)


def cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """A product with the state and one into it a position forward, four backward; every tensor once.

    An exponential for every feature below 0: half of those of the queries and of the keys.
    """
    batch, heads, length, width = shape.sizes
    elements = batch * heads * length * width
    products = {"fwd": 2, "bwd": 4, "both": 6}[mode]
    tensors = {"fwd": 4, "bwd": 7, "both": 11}[mode]
    exponentials = 0 if mode == "bwd" else elements
    return Cost(products * 2 * elements * width, tensors * elements * dtype.itemsize, True, exponentials)


def _arguments(inputs: Inputs) -> dict[str, object]:
    return {**inputs, "is_causal": True, "eps": EPS}


def providers(device: torch.device) -> Sequence[Provider]:
    function = fusewright.functional.linear_attention
    return (
        *ours.providers(device, function, _arguments, ours.tiny_inputs(make_inputs, TINY), takes_out=False),
        *ours.others(formula),
    )


OPERATION = Operation(
    name="linear_attention",
    shapes=SHAPES,
    tiny=TINY,
    make_inputs=make_inputs,
    formula=formula,
    providers=providers,
    cost=cost,
    differentiable=("query", "key", "value"),
    outputs=("output",),
    rank=4,
    baseline="naive",
    scaling=SCALING,
)
