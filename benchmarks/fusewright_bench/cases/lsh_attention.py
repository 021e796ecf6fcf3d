"""LSH attention, hashing and sorting included, against the two libraries that have it.

Sizes are B, H, T, D, R: batch, heads, length, head dimension, rounds. Chunks of 64 positions meet themselves and the
chunk before; there are T / 32 buckets. All providers take the same rotations and each hashes as it does.
"""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import fusewright.functional
from fusewright_bench.case import Cost, Forward, Inputs, Operation, Outputs, Provider, Shape, growth
from fusewright_bench.cases import ours
from fusewright_bench.peers import REFORMER_PYTORCH, TRANSFORMERS

_QUICK = frozenset({"quick"})
_MICRO = frozenset({"micro"})

SHAPES = (
    Shape("1x4x1024x64-r2", (1, 4, 1024, 64, 2), _QUICK),
    Shape("1x8x4096x64-r1", (1, 8, 4096, 64, 1), _MICRO),
    Shape("1x8x4096x64-r2", (1, 8, 4096, 64, 2), _MICRO),
    Shape("1x8x4096x64-r4", (1, 8, 4096, 64, 4), _MICRO),
    Shape("1x8x4096x64-r8", (1, 8, 4096, 64, 8), _MICRO),
)
SCALING = (
    growth("sequence length", (1024, 2048, 4096, 8192, 16384), lambda length: (1, 2, length, 64, 2)),
    growth("rounds", (1, 2, 4, 8), lambda rounds: (1, 2, 4096, 64, rounds)),
)
TINY = Shape("tiny", (1, 1, 128, 8, 1))
CHUNK_LENGTH = 64
WINDOW = 2


def _buckets(length: int) -> int:
    return 2 * max(1, length // CHUNK_LENGTH)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    batch, heads, length, width, rounds = shape.sizes

    def coarse(*size: int) -> Tensor:
        # Multiples of 1/64 make rotated coordinates exact in float32, so that no provider rounds a vector into another
        # bucket than the oracle's.
        return (torch.randn(size, generator=generator) * 64).round() / 64

    return {
        "query_key": coarse(batch, heads, length, width).to(device, dtype),
        "value": torch.randn(batch, heads, length, width, generator=generator).to(device, dtype),
        "rotations": coarse(heads, width, rounds, _buckets(length) // 2).to(device),
    }


def _arguments(causal: bool, inputs: Inputs) -> dict[str, Any]:
    rounds = inputs["rotations"].shape[2]
    return {**inputs, "n_hashes": rounds, "chunk_length": CHUNK_LENGTH, "is_causal": causal}


def formula(causal: bool, inputs: Inputs) -> Outputs:
    """Sort, gather the chunks, two batched products and a softmax."""
    return ours.as_outputs(fusewright.functional.lsh_attention(**_arguments(causal, inputs), backend="reference"))


def cost(causal: bool, shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """Two products forward and five backward of every pair that meets, and the rotation; every tensor once."""
    batch, heads, length, width, rounds = shape.sizes
    vectors = batch * heads * length
    product = 2 * vectors * rounds * WINDOW * CHUNK_LENGTH * width
    rotation = vectors * width * rounds * _buckets(length)
    flops = {"fwd": 2 * product + rotation, "bwd": 5 * product, "both": 7 * product + rotation}[mode]
    tensors = {"fwd": 3, "bwd": 6, "both": 9}[mode]
    exponentials = 0 if mode == "bwd" else product // (2 * width)
    return Cost(flops, tensors * vectors * width * dtype.itemsize, matrix=True, exponentials=exponentials)


def _with_offsets(buckets: Tensor, count: int) -> Tensor:
    """(..., R, T) buckets that differ between rounds, flat, as both libraries want them."""
    rounds = torch.arange(buckets.shape[-2], device=buckets.device)
    return (buckets + count * rounds[:, None]).flatten(-2)


def _bind_transformers(causal: bool, inputs: Inputs) -> Forward:
    """The attention of its layer, without the layer's projections."""
    config_of = import_module("transformers").ReformerConfig
    layer = import_module("transformers.models.reformer.modeling_reformer").LSHSelfAttention
    query_key, value, rotations = inputs["query_key"], inputs["value"], inputs["rotations"]
    _, heads, length, width = query_key.shape
    count, rounds = _buckets(length), rotations.shape[2]

    class GivenRotations(layer):  # type: ignore[misc, valid-type]
        def _hash_vectors(self, vectors: Tensor, *_: Any, **__: Any) -> Tensor:
            rotated = torch.einsum("bmtd,mdhr->bmhtr", vectors.detach(), rotations.to(vectors.dtype))
            return _with_offsets(torch.cat([rotated, -rotated], dim=-1).argmax(-1), count)

    config = config_of(
        attention_head_size=width, num_attention_heads=heads, hidden_size=heads * width, is_decoder=causal,
        lsh_attn_chunk_length=CHUNK_LENGTH, num_hashes=rounds, num_buckets=count, lsh_attention_probs_dropout_prob=0.0,
        attn_layers=["lsh"], max_position_embeddings=length,
    )  # fmt: skip
    attention = GivenRotations(config).eval()
    # Its forward projects a hidden state into both operands; here they are given.
    projected = {"query_key": query_key, "value": value}
    hidden = query_key.detach().transpose(1, 2).flatten(2)
    for name, tensor in projected.items():
        setattr(attention, name, _Constant(tensor.transpose(1, 2).flatten(2)))
    return lambda: (attention(hidden).hidden_states.unflatten(-1, (heads, width)).transpose(1, 2),)


class _Constant(torch.nn.Module):
    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: Tensor) -> Tensor:
        return self.result


def _bind_reformer_pytorch(causal: bool, inputs: Inputs) -> Forward:
    layer = import_module("reformer_pytorch").LSHAttention
    query_key, value, rotations = (inputs[name] for name in ("query_key", "value", "rotations"))
    batch, _, length, width = query_key.shape

    class GivenRotations(layer):  # type: ignore[misc, valid-type]
        def hash_vectors(self, n_buckets: int, vecs: Tensor, **_: Any) -> Tensor:
            wide = rotations.to(vecs.dtype).repeat(batch, 1, 1, 1)
            rotated = torch.einsum("btf,bfhi->bhti", vecs, wide)
            return _with_offsets(torch.cat([rotated, -rotated], dim=-1).argmax(-1), _buckets(length))

    attention = GivenRotations(bucket_size=CHUNK_LENGTH, n_hashes=rotations.shape[2], causal=causal, return_attn=False)
    # Its logits have a factor of 1 / sqrt(D), which the query takes back; its keys are of unit length anyway.
    return lambda: (
        attention((query_key * width**0.5).flatten(0, 1), value.flatten(0, 1))[0].unflatten(0, query_key.shape[:2]),
    )


def _declare(causal: bool) -> Operation:
    plain, arguments = partial(formula, causal), partial(_arguments, causal)

    def tiny_inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return make_inputs(TINY, dtype, device, torch.Generator().manual_seed(0))

    def providers(device: torch.device) -> Sequence[Provider]:
        return (
            *ours.providers(device, fusewright.functional.lsh_attention, arguments, tiny_inputs, takes_out=False),
            Provider("naive", "reference", lambda inputs: partial(plain, inputs)),
            TRANSFORMERS.provider(partial(_bind_transformers, causal)),
            REFORMER_PYTORCH.provider(partial(_bind_reformer_pytorch, causal)),
        )

    return Operation(
        name="causal_lsh_attention" if causal else "lsh_attention",
        shapes=SHAPES,
        tiny=TINY,
        make_inputs=make_inputs,
        formula=plain,
        providers=providers,
        cost=partial(cost, causal),
        differentiable=("query_key", "value"),
        outputs=("output",),
        rank=5,
        scaling=SCALING if causal else (),
        baseline="naive",
    )


OPERATIONS = (_declare(False), _declare(True))
