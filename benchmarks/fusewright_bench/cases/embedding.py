"""Embedding with learned positions: sizes are batch B, length T, vocabulary V and width E."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fusewright.functional
from fusewright_bench.case import Cost, Inputs, Operation, Outputs, Provider, Shape
from fusewright_bench.cases import ours
from fusewright_kernels.embedding import reference

_QUICK = frozenset({"quick", "micro"})
_MODELS = frozenset({"models"})

SHAPES = (
    Shape("4x256x8192x256", (4, 256, 8192, 256), _QUICK),
    Shape("gpt2", (4, 1024, 50257, 768), _MODELS),
    Shape("bert-base", (8, 512, 30522, 768), _MODELS),
)
TINY = Shape("tiny", (1, 1, 8, 8))


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Tokens as frequent as words are: the n-th with a share of about 1 / n."""
    batch, length, words, width = shape.sizes
    tokens = (float(words) ** torch.rand(batch, length, generator=generator)).long() - 1
    weight, table = (torch.randn(rows, width, generator=generator) for rows in (words, length))
    return {"tokens": tokens.to(device), "weight": weight.to(device, dtype), "table": table.to(device, dtype)}


def formula(inputs: Inputs) -> Outputs:
    tokens = inputs["tokens"]
    rows = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return (reference.embedding(tokens, inputs["weight"], inputs["table"], rows, 1.0),)


def _torch(tokens: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    return F.embedding(tokens, weight) + table[: tokens.shape[1]]


def cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    batch, length, words, width = shape.sizes
    rows = batch * length
    forward = (2 * rows + length) * width
    # The gradient of every word is written, also where it is zero.
    backward = (rows + words + length) * width
    elements = {"fwd": forward, "bwd": backward, "both": forward + backward}[mode]
    return Cost(flops={"fwd": 1, "bwd": 2, "both": 3}[mode] * rows * width, bytes=elements * dtype.itemsize)


def providers(device: torch.device) -> Sequence[Provider]:
    def tiny_inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return make_inputs(TINY, dtype, device, torch.Generator().manual_seed(0))

    return (
        *ours.providers(device, fusewright.functional.embedding, dict, tiny_inputs, takes_out=False),
        Provider("naive", "reference", lambda inputs: partial(formula, inputs)),
        Provider("torch", "torch", lambda inputs: ours.forward_of(_torch, dict(inputs))),
        ours.compiled(formula),
    )


OPERATION = Operation(
    name="embedding",
    shapes=SHAPES,
    tiny=TINY,
    make_inputs=make_inputs,
    formula=formula,
    providers=providers,
    cost=cost,
    differentiable=("weight", "table"),
    outputs=("output",),
    rank=4,
)
