"""A linear layer on the few rows of a decoding step: sizes are rows M, input features I and output features O."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

import fusewright.functional
from fusewright_bench.case import Cost, Inputs, Operation, Outputs, Provider, Shape
from fusewright_bench.cases import ours
from fusewright_kernels.linear import reference

_QUICK = frozenset({"quick", "micro"})
_MICRO = frozenset({"micro"})
_MODELS = frozenset({"models"})

SHAPES = (
    Shape("1x768x50257", (1, 768, 50257), _QUICK | _MODELS),  # GPT-2's next word
    Shape("2x4096x4096", (2, 4096, 4096), _MICRO),
    Shape("8x4096x4096", (8, 4096, 4096), _MICRO),
    Shape("llama3-8b", (1, 4096, 14336), _MODELS),
)
TINY = Shape("tiny", (1, 128, 128))


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    rows, width, columns = shape.sizes
    weight = torch.randn(columns, width, generator=generator) * width**-0.5
    return {
        "input": torch.randn(rows, width, generator=generator).to(device, dtype),
        "weight": weight.to(device, dtype),
        "bias": torch.randn(columns, generator=generator).to(device, dtype),
    }


def formula(inputs: Inputs) -> Outputs:
    return (reference.linear(inputs["input"], inputs["weight"], inputs["bias"]),)


def cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    rows, width, columns = shape.sizes
    elements = rows * width + columns * (width + 1) + rows * columns
    return Cost(flops=2 * rows * width * columns, bytes=elements * dtype.itemsize, matrix=True)


def providers(device: torch.device) -> Sequence[Provider]:
    def tiny_inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return make_inputs(TINY, dtype, device, torch.Generator().manual_seed(0))

    return (
        *ours.providers(device, fusewright.functional.linear, dict, tiny_inputs, takes_out=False),
        Provider("naive", "reference", lambda inputs: partial(formula, inputs)),
        Provider("torch", "torch", lambda inputs: ours.forward_of(F.linear, dict(inputs))),
        ours.compiled(formula),
    )


OPERATION = Operation(
    name="linear",
    shapes=SHAPES,
    tiny=TINY,
    make_inputs=make_inputs,
    formula=formula,
    providers=providers,
    cost=cost,
    differentiable=(),
    outputs=("output",),
    rank=3,
    modes=("fwd",),
)
