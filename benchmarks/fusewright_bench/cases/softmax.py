"""softmax over the last dimension: attention rows (B, H, T, S) and vocabularies (tokens, words) of real models."""

import math
from collections.abc import Sequence
from functools import partial
from importlib import import_module

import torch

import fusewright.functional
from fusewright_bench.case import Cost, Forward, Inputs, Operation, Outputs, Provider, Shape
from fusewright_bench.cases import ours
from fusewright_bench.peers import QUACK
from fusewright_kernels.softmax import reference

_EVERY = frozenset({"quick", "micro"})
_MODELS = frozenset({"models"})

SHAPES = (
    Shape("64x1024", (64, 1024), _EVERY),
    Shape("4096x1024", (4096, 1024), _EVERY),
    Shape("gpt2-attention", (1, 12, 1024, 1024), _MODELS),
    Shape("gpt2-vocabulary", (64, 50257), _MODELS),  # the next word of 64 sequences
    Shape("bert-base-attention", (4, 12, 512, 512), _MODELS),
    Shape("llama3-8b-attention", (1, 32, 512, 512), _MODELS),
    Shape("llama3-8b-vocabulary", (32, 128256), _MODELS),
    Shape("vit-b16-attention", (8, 12, 197, 197), _MODELS),
    # 16 chunks of 256 queries over their own keys and those of the chunk before, in one hash round.
    Shape("reformer-enwik8-chunks", (8, 16, 256, 512), _MODELS),
)
TINY = Shape("tiny", (1, 8))

# Floating-point operations per element: maximum, subtraction, exponential, sum, scale; product sum 2, subtraction,
# product. An exponential counts as one.
FORWARD_FLOPS = 5
BACKWARD_FLOPS = 4


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Logits of spread 3: some rows peak and some are flat, as attention's are."""
    return {"input": (3.0 * torch.randn(shape.sizes, generator=generator)).to(device, dtype)}


def formula(inputs: Inputs) -> Outputs:
    return (reference.softmax(inputs["input"], -1, inputs["input"].dtype),)


def cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """Forward: input -> output. Backward: grad_output, output -> grad_input."""
    elements = math.prod(shape.sizes)
    flops = {"fwd": FORWARD_FLOPS, "bwd": BACKWARD_FLOPS, "both": FORWARD_FLOPS + BACKWARD_FLOPS}[mode]
    tensors = {"fwd": 2, "bwd": 3, "both": 5}[mode]
    exponentials = 0 if mode == "bwd" else elements
    return Cost(flops * elements, tensors * elements * dtype.itemsize, exponentials=exponentials)


def _bind_quack(inputs: Inputs) -> Forward:
    quack = import_module("quack")
    rows = inputs["input"].flatten(0, -2)
    return lambda: (quack.softmax(rows).view(inputs["input"].shape),)


def _tiny_inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
    return make_inputs(TINY, dtype, device, torch.Generator().manual_seed(0))


def providers(device: torch.device) -> Sequence[Provider]:
    return (
        *ours.providers(
            device,
            fusewright.functional.softmax,
            lambda inputs: {**inputs, "dim": -1},
            _tiny_inputs,
            takes_out=True,
        ),
        Provider("naive", "reference", lambda inputs: partial(formula, inputs)),
        Provider("torch", "torch", lambda inputs: ours.forward_of(torch.softmax, {**inputs, "dim": -1})),
        ours.compiled(formula),
        QUACK.provider(_bind_quack),
    )


OPERATION = Operation(
    name="softmax",
    shapes=SHAPES,
    tiny=TINY,
    make_inputs=make_inputs,
    formula=formula,
    providers=providers,
    cost=cost,
    differentiable=("input",),
    outputs=("output",),
)
