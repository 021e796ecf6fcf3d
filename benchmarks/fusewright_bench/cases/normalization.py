"""layer_norm, rms_norm, add_layer_norm and add_rms_norm on the activations of real models: (tokens, hidden)."""

import math
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import fusewright.functional
from fusewright_bench.case import Cost, Forward, Inputs, Operation, Outputs, Provider, Shape, growth
from fusewright_bench.cases import ours
from fusewright_bench.peers import FLASH_ATTN, LIGER, QUACK
from fusewright_kernels.normalization import reference

EPS = 1e-5

_EVERY = frozenset({"quick", "micro"})
_MODELS = frozenset({"models"})

MICRO = (Shape("64x1024", (64, 1024), _EVERY), Shape("4096x1024", (4096, 1024), _EVERY))
GPT2 = Shape("gpt2", (1024, 768), _MODELS)  # one sequence of its context length
BERT_BASE = Shape("bert-base", (8, 512, 768), _MODELS)
LLAMA3_8B = Shape("llama3-8b", (512, 4096), _MODELS)  # a prompt of 512 tokens
VIT_B16 = Shape("vit-b16", (8, 197, 768), _MODELS)  # 14 x 14 patches and the class token
VIT_B16_QK = Shape("vit-b16-qk-norm", (8, 12, 197, 64), _MODELS, layout="packed_qkv")
# A quarter of its 65536 positions, so that the float64 oracle of a backward fits into the memory of a laptop.
REFORMER = Shape("reformer-enwik8", (16384, 1024), _MODELS)

SHAPES = {
    "layer_norm": (*MICRO, GPT2, BERT_BASE, VIT_B16, VIT_B16_QK, REFORMER),
    "rms_norm": (*MICRO, LLAMA3_8B, VIT_B16_QK),
    "add_layer_norm": (*MICRO, GPT2, BERT_BASE, VIT_B16, REFORMER),
    "add_rms_norm": (*MICRO, LLAMA3_8B),
}

SCALING = (
    growth("hidden size", (64, 256, 1024, 4096, 16384), lambda hidden: (1024, hidden)),
    growth("rows", (16, 256, 4096, 16384), lambda rows: (rows, 1024)),
)

# Floating-point operations per element. Forward: centre 2, sum of squares 2, scale 1, weight 1, bias 1; RMS has no
# centring and no bias. Backward: x_hat 2, weighted gradient 1, its sum 1, its product sum 2, input gradient 4, weight
# gradient 2, bias gradient 1; RMS 1 + 1 + 2 + 3 + 2.
FORWARD_FLOPS = {"layer": 7, "rms": 4}
BACKWARD_FLOPS = {"layer": 13, "rms": 9}


def _activations(shape: Shape, generator: torch.Generator) -> Tensor:
    if shape.layout == "packed_qkv":
        batch, heads, tokens, head_dim = shape.sizes
        packed = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator)
        return packed[:, :, 0].transpose(1, 2)
    return torch.randn(shape.sizes, generator=generator)


def make_inputs(
    kind: str, fused_add: bool, shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    """input and residual (*, N), weight and bias (N), all of ``dtype``."""
    hidden = shape.sizes[-1]
    made = {"input": _activations(shape, generator)}
    if fused_add:
        made["residual"] = _activations(shape, generator)
    made["weight"] = 1.0 + 0.1 * torch.randn(hidden, generator=generator)
    if kind == "layer":
        made["bias"] = 0.1 * torch.randn(hidden, generator=generator)
    return {name: tensor.to(device, dtype) for name, tensor in made.items()}


def formula(kind: str, fused_add: bool, inputs: Inputs) -> Outputs:
    """The plain formula, in float32 or wider and rounded once."""
    center = kind == "layer"
    parameters = (inputs["weight"], inputs.get("bias"))
    if not fused_add:
        return (reference.norm(inputs["input"], *parameters, 1, EPS, center, 0.0),)
    stream_dtype = inputs["residual"].dtype
    return reference.add_norm_with_statistics(
        inputs["input"], inputs["residual"], *parameters, None, 1, EPS, center, 0.0, 0.0, stream_dtype
    )[:2]


def cost(kind: str, fused_add: bool, shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """Activations and parameters once each; the row statistics, 8 bytes a row, are left out.

    Forward: input -> output; with the addition input, residual -> output, new_residual. Backward: grad_output,
    input -> grad_input; with the addition grad_output, grad_new_residual, new_residual -> one gradient, which input
    and residual share as long as there is no dropout between them.
    """
    elements = math.prod(shape.sizes)
    parameters = shape.sizes[-1] * (2 if kind == "layer" else 1)
    forward_flops = (FORWARD_FLOPS[kind] + fused_add) * elements
    backward_flops = (BACKWARD_FLOPS[kind] + fused_add) * elements
    forward_bytes = ((4 if fused_add else 2) * elements + parameters) * dtype.itemsize
    backward_bytes = ((4 if fused_add else 3) * elements + 2 * parameters) * dtype.itemsize
    return Cost(
        flops={"fwd": forward_flops, "bwd": backward_flops, "both": forward_flops + backward_flops}[mode],
        bytes={"fwd": forward_bytes, "bwd": backward_bytes, "both": forward_bytes + backward_bytes}[mode],
    )


def _arguments(inputs: Inputs) -> dict[str, Any]:
    return {**inputs, "normalized_shape": inputs["input"].shape[-1:], "eps": EPS}


def _bind_torch(kind: str, fused_add: bool, inputs: Inputs) -> Forward:
    """torch's own function, after a separate addition where the op fuses one."""
    norm = torch_functional.layer_norm if kind == "layer" else torch_functional.rms_norm
    keywords = _arguments(inputs)
    if not fused_add:
        return ours.forward_of(norm, keywords)
    input, residual = keywords.pop("input"), keywords.pop("residual")

    def forward() -> Outputs:
        new_residual = input + residual
        return norm(new_residual, **keywords), new_residual

    return forward


def _bind_liger(kind: str, fused_add: bool, inputs: Inputs) -> Forward:
    liger = import_module("liger_kernel.transformers.functional")
    input, weight = inputs["input"], inputs["weight"]
    if kind == "layer":
        return lambda: (liger.liger_layer_norm(input, weight, inputs["bias"], EPS),)
    if fused_add:
        return lambda: liger.liger_fused_add_rms_norm(input, inputs["residual"], weight, EPS, in_place=False)
    # In place, its backward would overwrite the gradient that every round starts from.
    return lambda: (liger.liger_rms_norm(input, weight, EPS, in_place=False),)


def _bind_flash_attn(kind: str, fused_add: bool, inputs: Inputs) -> Forward:
    layer_norm_fn = import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn
    return lambda: ours.as_outputs(
        layer_norm_fn(
            inputs["input"], inputs["weight"], inputs.get("bias"), residual=inputs.get("residual"), eps=EPS,
            prenorm=fused_add, is_rms_norm=kind == "rms",
        )
    )  # fmt: skip


def _bind_quack(kind: str, fused_add: bool, inputs: Inputs) -> Forward:
    quack = import_module("quack")
    return lambda: ours.as_outputs(
        quack.rmsnorm(inputs["input"], inputs["weight"], residual=inputs.get("residual"), eps=EPS, prenorm=fused_add)
    )


def _declare(kind: str, fused_add: bool) -> Operation:
    name = f"{'add_' if fused_add else ''}{kind}_norm"
    make = partial(make_inputs, kind, fused_add)
    plain = partial(formula, kind, fused_add)
    tiny = Shape("tiny", (1, 8))
    residual = ("residual",) if fused_add else ()
    bias = ("bias",) if kind == "layer" else ()

    def tiny_inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return make(tiny, dtype, device, torch.Generator().manual_seed(0))

    def providers(device: torch.device) -> Sequence[Provider]:
        functional = getattr(fusewright.functional, name)
        peers = [FLASH_ATTN.provider(partial(_bind_flash_attn, kind, fused_add))]
        if not (kind == "layer" and fused_add):
            peers.append(LIGER.provider(partial(_bind_liger, kind, fused_add)))
        if kind == "rms":
            peers.append(QUACK.provider(partial(_bind_quack, kind, fused_add)))
        return (
            *ours.providers(device, functional, _arguments, tiny_inputs, takes_out=not fused_add),
            Provider("naive", "reference", lambda inputs: partial(plain, inputs)),
            Provider("torch", "torch", partial(_bind_torch, kind, fused_add)),
            ours.compiled(plain),
            *peers,
        )

    return Operation(
        name=name,
        shapes=SHAPES[name],
        tiny=tiny,
        make_inputs=make,
        formula=plain,
        providers=providers,
        cost=partial(cost, kind, fused_add),
        differentiable=("input", *residual, "weight", *bias),
        outputs=("output", "new_residual") if fused_add else ("output",),
        scaling=() if fused_add else SCALING,
    )


OPERATIONS = tuple(_declare(kind, fused_add) for fused_add in (False, True) for kind in ("layer", "rms"))
