"""Exact attention of real models: full, causal, with a boolean mask that leaves half the blocks empty, and decoding.

Sizes are B, H, HK, T, S, D: batch, query heads, key/value heads, queries, keys, head dimension.
"""

import math
from collections.abc import Sequence
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

import fusewright.functional
from fusewright_bench.case import MODES, Cost, Forward, Inputs, Operation, Outputs, Provider, Shape, growth
from fusewright_bench.cases import ours, torch_attention
from fusewright_bench.peers import FLASH_ATTN, XFORMERS

_QUICK = frozenset({"quick", "micro"})
_MICRO = frozenset({"micro"})
_MODELS = frozenset({"models"})

_SQUARES = (
    Shape("1x4x4x1024x1024x64", (1, 4, 4, 1024, 1024, 64), _QUICK),
    Shape("1x1x1x4096x4096x64", (1, 1, 1, 4096, 4096, 64), _MICRO),
    Shape("1x2x2x1024x1024x128", (1, 2, 2, 1024, 1024, 128), _MICRO),
)
SHAPES = {
    "attention": (
        *_SQUARES,
        Shape("bert-base", (4, 12, 12, 512, 512, 64), _MODELS),
        Shape("vit-b16", (8, 12, 12, 197, 197, 64), _MODELS),
    ),
    "causal_attention": (
        *_SQUARES,
        Shape("gpt2", (1, 12, 12, 1024, 1024, 64), _MODELS),
        Shape("llama3-8b", (1, 32, 8, 1024, 1024, 128), _MODELS),
    ),
    "masked_attention": _SQUARES[:1],
    "decode_attention": (
        Shape("llama3-8b-decode-4096", (1, 32, 8, 1, 4096, 128), _QUICK | _MODELS),
        Shape("one-head-decode-65536", (1, 1, 1, 1, 65536, 128), _MICRO),
    ),
}
SCALING = (
    growth("sequence length", (256, 512, 1024, 2048, 4096), lambda length: (1, 2, 2, length, length, 64)),
    growth("head dimension", (16, 32, 64, 128), lambda width: (1, 2, 2, 1024, 1024, width)),
    growth("batch", (1, 2, 4, 8), lambda batch: (batch, 2, 2, 1024, 1024, 64)),
)
TINY = Shape("tiny", (1, 1, 1, 8, 8, 8))
MASK_BLOCK = 128


def make_inputs(
    kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    batch, heads, key_heads, queries, keys, width = shape.sizes
    sizes = {
        "query": (batch, heads, queries, width),
        "key": (batch, key_heads, keys, width),
        "value": (batch, key_heads, keys, width),
    }
    made = {name: torch.randn(size, generator=generator).to(device, dtype) for name, size in sizes.items()}
    if kind == "masked_attention":
        # A checkerboard of blocks: every row sees half of its keys.
        rows, columns = torch.arange(queries) // MASK_BLOCK, torch.arange(keys) // MASK_BLOCK
        made["attn_mask"] = ((rows[:, None] + columns) % 2 == 0).to(device)
    return made


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def formula(kind: str, inputs: Inputs) -> Outputs:
    """Two products and a softmax in the inputs' dtype, with the (T, S) matrix in memory."""
    query = inputs["query"]
    key, value = _repeated(inputs["key"], query.shape[1]), _repeated(inputs["value"], query.shape[1])
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    if kind == "causal_attention":
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(hidden, -math.inf)
    if "attn_mask" in inputs:
        logits = logits.masked_fill(~inputs["attn_mask"].bool(), -math.inf)
    return (torch.softmax(logits, -1) @ value,)


def cost(kind: str, shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """Two products forward and five backward of the pairs that take part; query, key, value and output once each."""
    batch, heads, key_heads, queries, keys, width = shape.sizes
    share = 0.5 if kind in ("causal_attention", "masked_attention") else 1.0
    product = int(2 * batch * heads * queries * keys * width * share)
    products = {"fwd": 2, "bwd": 5, "both": 7}[mode]
    query_elements, key_elements = batch * heads * queries * width, batch * key_heads * keys * width
    forward, backward = 2 * query_elements + 2 * key_elements, 4 * query_elements + 4 * key_elements
    elements = {"fwd": forward, "bwd": backward, "both": forward + backward}[mode]
    exponentials = 0 if mode == "bwd" else product // (2 * width)
    return Cost(products * product, elements * dtype.itemsize, matrix=True, exponentials=exponentials)


def _arguments(kind: str, inputs: Inputs) -> dict[str, object]:
    return {**inputs, "is_causal": kind == "causal_attention", "enable_gqa": True}


def _bind_flash_attn(kind: str, inputs: Inputs) -> Forward:
    flash_attn_func = import_module("flash_attn").flash_attn_func
    tensors = [inputs[name].transpose(1, 2) for name in ("query", "key", "value")]
    return lambda: (flash_attn_func(*tensors, causal=kind == "causal_attention").transpose(1, 2),)


def _bind_xformers(kind: str, inputs: Inputs) -> Forward:
    """(B, T, H, D); fewer key heads are broadcast over groups of query heads, (B, T, HK, H / HK, D)."""
    fmha = import_module("xformers.ops.fmha")
    query, key, value = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    heads, key_heads = query.shape[2], key.shape[2]
    if heads != key_heads:
        query = query.unflatten(2, (key_heads, heads // key_heads))
        key, value = (tensor.unsqueeze(3).expand(-1, -1, -1, heads // key_heads, -1) for tensor in (key, value))
    bias = None
    if kind == "causal_attention":
        bias = fmha.attn_bias.LowerTriangularMask()
    elif "attn_mask" in inputs:
        hidden = torch.zeros(inputs["attn_mask"].shape, dtype=query.dtype, device=query.device)
        bias = hidden.masked_fill(~inputs["attn_mask"], -math.inf).expand(query.shape[0], heads, -1, -1)
    return lambda: (fmha.memory_efficient_attention(query, key, value, attn_bias=bias).flatten(2, -2).transpose(1, 2),)


def _declare(kind: str) -> Operation:
    make, plain, arguments = partial(make_inputs, kind), partial(formula, kind), partial(_arguments, kind)

    def tiny_inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return make(TINY, dtype, device, torch.Generator().manual_seed(0))

    def providers(device: torch.device) -> Sequence[Provider]:
        attention = fusewright.functional.scaled_dot_product_attention
        peers = [XFORMERS.provider(partial(_bind_xformers, kind))]
        if kind != "masked_attention":
            peers.append(FLASH_ATTN.provider(partial(_bind_flash_attn, kind)))
        return (
            *ours.providers(device, attention, arguments, tiny_inputs, takes_out=False),
            Provider("naive", "reference", lambda inputs: partial(plain, inputs)),
            *torch_attention.providers(arguments, tiny_inputs),
            ours.compiled(plain),
            *peers,
        )

    return Operation(
        name=kind,
        shapes=SHAPES[kind],
        tiny=TINY,
        make_inputs=make,
        formula=plain,
        providers=providers,
        cost=partial(cost, kind),
        differentiable=("query", "key", "value"),
        outputs=("output",),
        rank=6,
        modes=("fwd",) if kind == "decode_attention" else MODES,
        scaling=SCALING if kind == "causal_attention" else (),
    )


OPERATIONS = tuple(_declare(kind) for kind in SHAPES)
