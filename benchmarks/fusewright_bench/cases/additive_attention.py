"""Additive attention of sequence-to-sequence models: an encoder's states, and one decoding step.

Sizes are B, H, T, S, D: batch, heads, queries, keys, width of queries, keys and values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import fusewright.functional
from fusewright_bench.case import Cost, Inputs, Operation, Outputs, Provider, Shape
from fusewright_bench.cases import ours

_MICRO = frozenset({"micro"})
_QUICK = frozenset({"quick", "micro"})

SHAPES = (
    Shape("1x1x256x256x64", (1, 1, 256, 256, 64), _QUICK),
    Shape("decoder-step-64x1x1x50x512", (64, 1, 1, 50, 512), _MICRO),
)
TINY = Shape("tiny", (1, 1, 8, 8, 8))


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    batch, heads, queries, keys, width = shape.sizes

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return {
        "query": normal(batch, heads, queries, width).to(device, dtype),
        "key": normal(batch, heads, keys, width).to(device, dtype),
        "value": normal(batch, heads, keys, width).to(device, dtype),
        "score_weight": (normal(heads, width) / width**0.5).to(device, dtype),
    }


def formula(inputs: Inputs) -> Outputs:
    """With the (B, H, T, S, D) sums in memory."""
    query, key, value, weight = (inputs[name] for name in ("query", "key", "value", "score_weight"))
    terms = torch.tanh(query[:, :, :, None] + key[:, :, None])
    scores = terms @ weight.to(terms.dtype)[:, None, :, None]
    return (torch.softmax(scores[..., 0], -1) @ value,)


def cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """Forward: a sum, a tanh and a product per pair and element, and the product with the values; backward three times
    that of the scores and two products; every tensor once."""
    batch, heads, queries, keys, width = shape.sizes
    pairs = batch * heads * queries * keys * width
    flops = {"fwd": 6, "bwd": 18, "both": 24}[mode] * pairs
    elements = batch * heads * (2 * queries + 2 * keys) * width
    passes = {"fwd": 1, "bwd": 2, "both": 3}[mode]
    return Cost(flops, passes * elements * dtype.itemsize, exponentials=0 if mode == "bwd" else pairs)


def providers(device: torch.device) -> Sequence[Provider]:
    function = fusewright.functional.additive_attention
    return (
        *ours.providers(device, function, dict, ours.tiny_inputs(make_inputs, TINY), takes_out=False),
        *ours.others(formula),
    )


OPERATION = Operation(
    name="additive_attention",
    shapes=SHAPES,
    tiny=TINY,
    make_inputs=make_inputs,
    formula=formula,
    providers=providers,
    cost=cost,
    differentiable=("query", "key", "value", "score_weight"),
    outputs=("output",),
    rank=5,
    baseline="naive",
)
