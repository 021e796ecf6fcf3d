"""cross_entropy over vocabularies (tokens, words), and linear_cross_entropy (tokens, words, width), of real models."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fusewright.functional
from fusewright_bench.case import Cost, Inputs, Operation, Outputs, Provider, Shape
from fusewright_bench.cases import ours
from fusewright_kernels.cross_entropy import reference
from fusewright_kernels.cross_entropy.reference import Options

_EVERY = frozenset({"quick", "micro"})
_MICRO = frozenset({"micro"})
_MODELS = frozenset({"models"})

SHAPES = (
    Shape("64x1000", (64, 1000), _EVERY),
    Shape("512x8192", (512, 8192), _EVERY),
    Shape("512x50257", (512, 50257), _MICRO | _MODELS),
    Shape("bert-base", (512, 30522), _MODELS),
    Shape("llama3-8b", (256, 128256), _MODELS),
)
LINEAR_SHAPES = (
    Shape("512x8192x256", (512, 8192, 256), _EVERY),
    Shape("gpt2-small", (4096, 50257, 768), _MICRO | _MODELS),
    Shape("bert-base", (2048, 30522, 768), _MODELS),
)
TINY = Shape("tiny", (1, 8))
LINEAR_TINY = Shape("tiny", (1, 8, 8))

# Floating-point operations per logit: maximum, subtraction, exponential, sum; subtraction, exponential, product,
# difference, product. An exponential counts as one.
FORWARD_FLOPS = 4
BACKWARD_FLOPS = 5


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    rows, words = shape.sizes
    logits = 3.0 * torch.randn(rows, words, generator=generator)
    return {"input": logits.to(device, dtype), "target": _targets(rows, words, generator).to(device)}


def make_linear_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """A weight whose logits have spread 3."""
    rows, words, width = shape.sizes
    hidden, weight = (torch.randn(size, width, generator=generator) for size in (rows, words))
    return {
        "input": hidden.to(device, dtype),
        "weight": (3.0 * weight / width**0.5).to(device, dtype),
        "target": _targets(rows, words, generator).to(device),
    }


def _targets(rows: int, words: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, words, (rows,), generator=generator)


def _mean(logits: Tensor, target: Tensor) -> Outputs:
    return (reference.losses(logits, target, None, Options()).mean().to(logits.dtype),)


def formula(inputs: Inputs) -> Outputs:
    return _mean(inputs["input"], inputs["target"])


def linear_formula(inputs: Inputs) -> Outputs:
    return _mean(inputs["input"] @ inputs["weight"].mT, inputs["target"])


def cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """Forward reads the logits, backward reads them and writes their gradient."""
    rows, words = shape.sizes
    flops = {"fwd": FORWARD_FLOPS, "bwd": BACKWARD_FLOPS, "both": FORWARD_FLOPS + BACKWARD_FLOPS}[mode]
    tensors = {"fwd": 1, "bwd": 2, "both": 3}[mode]
    return Cost(flops=flops * rows * words, bytes=tensors * rows * words * dtype.itemsize)


def linear_cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """One product forward, two backward; the operands and their gradients."""
    rows, words, width = shape.sizes
    products = {"fwd": 1, "bwd": 2, "both": 3}[mode]
    tensors = {"fwd": 1, "bwd": 2, "both": 2}[mode]
    elements = rows * width + words * width
    return Cost(flops=2 * products * rows * words * width, bytes=tensors * elements * dtype.itemsize, matrix=True)


def _torch_linear(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def providers(device: torch.device) -> Sequence[Provider]:
    tiny = partial(_tiny_inputs, make_inputs, TINY)
    return (
        *ours.providers(device, fusewright.functional.cross_entropy, dict, tiny, takes_out=False),
        Provider("naive", "reference", lambda inputs: partial(formula, inputs)),
        Provider("torch", "torch", lambda inputs: ours.forward_of(F.cross_entropy, dict(inputs))),
        ours.compiled(formula),
    )


def linear_providers(device: torch.device) -> Sequence[Provider]:
    tiny = partial(_tiny_inputs, make_linear_inputs, LINEAR_TINY)
    return (
        *ours.providers(device, fusewright.functional.linear_cross_entropy, dict, tiny, takes_out=False),
        Provider("naive", "reference", lambda inputs: partial(linear_formula, inputs)),
        Provider("torch", "torch", lambda inputs: ours.forward_of(_torch_linear, dict(inputs))),
        ours.compiled(linear_formula),
    )


def _tiny_inputs(make: ours.Make, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return make(shape, dtype, device, torch.Generator().manual_seed(0))


OPERATIONS = (
    Operation(
        name="cross_entropy",
        shapes=SHAPES,
        tiny=TINY,
        make_inputs=make_inputs,
        formula=formula,
        providers=providers,
        cost=cost,
        differentiable=("input",),
        outputs=("loss",),
    ),
    Operation(
        name="linear_cross_entropy",
        shapes=LINEAR_SHAPES,
        tiny=LINEAR_TINY,
        make_inputs=make_linear_inputs,
        formula=linear_formula,
        providers=linear_providers,
        cost=linear_cost,
        differentiable=("input", "weight"),
        outputs=("loss",),
        rank=3,
    ),
)
