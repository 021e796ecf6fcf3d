"""What stands between a block's products: rotary embedding (B, H, T, D), activations and dropout with a residual
(tokens, features).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fusewright.functional
from fusewright_bench.case import Cost, Inputs, Operation, Outputs, Provider, Shape
from fusewright_bench.cases import ours
from fusewright_kernels.activation import reference as activation
from fusewright_kernels.rotary import reference as rotary

_EVERY = frozenset({"quick", "micro"})
_MICRO = frozenset({"micro"})
_MODELS = frozenset({"models"})

SHAPES = (
    Shape("64x1024", (64, 1024), _MICRO),
    Shape("2048x3072", (2048, 3072), _EVERY),
    Shape("llama3-8b", (512, 14336), _MODELS),
)
TINY = Shape("tiny", (1, 8))
ROTARY_SHAPES = (
    Shape("1x12x1024x64", (1, 12, 1024, 64), _EVERY, layout="packed_qkv"),
    Shape("llama3-8b", (1, 32, 1024, 128), _MODELS, layout="packed_qkv"),
)
ROTARY_TINY = Shape("tiny", (1, 1, 1, 8))

Formula = Callable[[Inputs], Outputs]


def _matrices(
    names: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    """Normal matrices of the shape; a bias is a row of it."""
    sizes = {name: shape.sizes[-1:] if name == "bias" else shape.sizes for name in names}
    return {name: torch.randn(size, generator=generator).to(device, dtype) for name, size in sizes.items()}


def _rotary_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Heads as a fused projection leaves them, and the angles of base 10000."""
    batch, heads, length, width = shape.sizes
    projected = torch.randn(batch, length, 3, heads, width, generator=generator).to(device, dtype)
    pairs = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.arange(length, dtype=torch.float64)[:, None] * 10000.0**-pairs
    return {
        "input": projected[:, :, 0].transpose(1, 2),
        "cos": angles.cos().float().to(device),
        "sin": angles.sin().float().to(device),
    }


def _rotary_formula(inputs: Inputs) -> Outputs:
    return (rotary.rotate(inputs["input"], inputs["cos"][None], inputs["sin"][None], None, False),)


def _model_rotary(input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' Llama writes it."""
    cos, sin = (torch.cat([table, table], dim=-1).to(input.dtype) for table in (cos, sin))
    first, second = input.chunk(2, dim=-1)
    return input * cos + torch.cat([-second, first], dim=-1) * sin


def _element_cost(flops: dict[str, int], tensors: dict[str, int]) -> Callable[[Shape, torch.dtype, str], Cost]:
    """Operations and matrices read or written, per element and mode; an exponential counts as one."""

    def cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
        elements = math.prod(shape.sizes)
        return Cost(flops=flops[mode] * elements, bytes=tensors[mode] * elements * dtype.itemsize)

    return cost


def _operation(
    name: str,
    torch_function: Callable[..., Tensor],
    formula: Formula,
    make_inputs: ours.Make,
    differentiable: tuple[str, ...],
    cost: Callable[[Shape, torch.dtype, str], Cost],
    shapes: tuple[Shape, ...] = SHAPES,
    tiny: Shape = TINY,
) -> Operation:
    def tiny_inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return make_inputs(tiny, dtype, device, torch.Generator().manual_seed(0))

    def providers(device: torch.device) -> Sequence[Provider]:
        functional = getattr(fusewright.functional, name)
        return (
            *ours.providers(device, functional, dict, tiny_inputs, takes_out=False),
            Provider("naive", "reference", lambda inputs: partial(formula, inputs)),
            Provider("torch", "torch", lambda inputs: ours.forward_of(torch_function, dict(inputs))),
            ours.compiled(formula),
        )

    return Operation(
        name=name,
        shapes=shapes,
        tiny=tiny,
        make_inputs=make_inputs,
        formula=formula,
        providers=providers,
        cost=cost,
        differentiable=differentiable,
        outputs=("output",),
        rank=len(tiny.sizes),
    )


OPERATIONS = (
    _operation(
        "rotary_embedding",
        _model_rotary,
        _rotary_formula,
        _rotary_inputs,
        ("input",),
        _element_cost({"fwd": 3, "bwd": 3, "both": 6}, {"fwd": 2, "bwd": 2, "both": 4}),
        ROTARY_SHAPES,
        ROTARY_TINY,
    ),
    _operation(
        "swiglu",
        lambda gate, up: F.silu(gate) * up,
        lambda inputs: (activation.swiglu(inputs["gate"], inputs["up"]),),
        partial(_matrices, ("gate", "up")),
        ("gate", "up"),
        _element_cost({"fwd": 5, "bwd": 12, "both": 17}, {"fwd": 3, "bwd": 5, "both": 8}),
    ),
    _operation(
        "bias_gelu",
        lambda input, bias: F.gelu(input + bias),
        lambda inputs: (activation.bias_gelu(inputs["input"], inputs["bias"], False),),
        partial(_matrices, ("input", "bias")),
        ("input", "bias"),
        _element_cost({"fwd": 15, "bwd": 20, "both": 35}, {"fwd": 2, "bwd": 3, "both": 5}),
    ),
)
