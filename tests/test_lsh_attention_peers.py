"""LSH attention against the two libraries that have it, on the same buckets, in float64."""

import pytest
import torch
from torch import Tensor

import fusewright.functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
reformer_pytorch = pytest.importorskip("reformer_pytorch", reason="pip install reformer-pytorch")


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("before", "after", "rounds"), [(1, 0, 1), (1, 0, 3), (1, 1, 2), (0, 0, 2)])
def test_equals_transformers(before: int, after: int, rounds: int, causal: bool, padded: bool) -> None:
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    torch.manual_seed(0)
    batch, heads, length, width, chunk, n_buckets = 2, 3, 64, 8, 8, 16
    config = transformers.ReformerConfig(
        attention_head_size=width, num_attention_heads=heads, hidden_size=heads * width, is_decoder=causal,
        lsh_attn_chunk_length=chunk, lsh_num_chunks_before=before, lsh_num_chunks_after=after, num_hashes=rounds,
        num_buckets=n_buckets, lsh_attention_probs_dropout_prob=0.0, attn_layers=["lsh"],
    )  # fmt: skip
    theirs = LSHSelfAttention(config).double().eval()
    hidden = torch.randn(batch, length, heads * width, dtype=torch.float64, requires_grad=True)
    buckets = torch.randint(0, n_buckets, (batch, heads, rounds, length))
    padding = torch.zeros(batch, length, dtype=torch.bool)
    if padded:
        padding[1, 40:] = True
        buckets = torch.where(padding[:, None, None, :], n_buckets, buckets)
    offsets = (n_buckets + padded) * torch.arange(rounds)[:, None]
    result = theirs(
        hidden,
        attention_mask=(~padding) if padded else None,
        num_hashes=rounds,
        buckets=(buckets + offsets).reshape(batch, heads, -1),
    ).hidden_states
    query_key, value = (
        layer(hidden).unflatten(-1, (heads, width)).transpose(1, 2) for layer in (theirs.query_key, theirs.value)
    )
    ours = F.lsh_attention(
        query_key, value, buckets=buckets, chunk_length=chunk, chunks_before=before, chunks_after=after,
        is_causal=causal, key_padding_mask=padding if padded else None,
    ).transpose(1, 2).flatten(2)  # fmt: skip
    grad_output = torch.randn_like(ours)
    (our_gradient,) = torch.autograd.grad(ours, hidden, grad_output)
    (their_gradient,) = torch.autograd.grad(result, hidden, grad_output)
    # It adds 1e-6 to the mean square of a key, here about 1/3.
    assert relative_error(ours, result) < 2e-5
    assert relative_error(our_gradient, their_gradient) < 2e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("across", "duplicates"), [(True, True), (False, False)])
def test_equals_reformer_pytorch(causal: bool, across: bool, duplicates: bool) -> None:
    torch.manual_seed(1)
    batch, length, width, chunk, rounds = 3, 128, 16, 8, 4
    theirs = reformer_pytorch.LSHAttention(
        bucket_size=chunk, n_hashes=rounds, causal=causal, attend_across_buckets=across,
        allow_duplicate_attention=duplicates, return_attn=False,
    ).double()  # fmt: skip
    query_key, value = (torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True) for _ in range(2))
    result, _, their_buckets = theirs(query_key, value)
    n_buckets = length // chunk
    buckets = their_buckets.reshape(batch, 1, rounds, length) - n_buckets * torch.arange(rounds)[:, None]
    ours = F.lsh_attention(
        query_key[:, None], value[:, None], buckets=buckets, chunk_length=chunk, is_causal=causal,
        scale=width**-0.5, attend_across_buckets=across, allow_duplicates=duplicates,
    )[:, 0]  # fmt: skip
    grad_output = torch.randn_like(ours)
    our_gradients = torch.autograd.grad(ours, (query_key, value), grad_output)
    their_gradients = torch.autograd.grad(result, (query_key, value), grad_output)
    # Its count of copies is off by 1e-9.
    assert relative_error(ours, result) < 1e-8
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        assert relative_error(mine, other) < 1e-8
