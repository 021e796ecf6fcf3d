"""Sparse self-attention against a dense boolean mask, and against Longformer's own layer."""

import math

import pytest
import torch
from torch import Tensor

from fusewright.nn import SparseSelfAttention
from fusewright.patterns import Global, PerHead, Random, Strided, Window
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

WIDTH, HEADS = 12, 3


def dense(module: SparseSelfAttention, hidden: Tensor, visible: Tensor) -> Tensor:
    """The module's attention without global projections under a boolean mask (B or 1, H or 1, T, T)."""
    query, key, value = (
        part.transpose(1, 2) for part in module.in_proj(hidden).unflatten(-1, (3, HEADS, -1)).unbind(2)
    )
    logits = (query @ key.mT / math.sqrt(WIDTH // HEADS)).masked_fill(~visible, -math.inf)
    weights = torch.where(visible.any(-1, keepdim=True), torch.softmax(logits, -1), 0.0)
    return module.out_proj((weights @ value).transpose(1, 2).flatten(2))


def in_window(length: int, left: int, right: int, dilation: int = 1) -> Tensor:
    relative = torch.arange(length) - torch.arange(length)[:, None]
    return (relative % dilation == 0) & (relative >= -left * dilation) & (relative <= right * dilation)


def check(module: SparseSelfAttention, visible: Tensor, length: int, **masks: Tensor) -> None:
    hidden = torch.randn(2, length, WIDTH, requires_grad=True)
    actual, expected = module(hidden, **masks), dense(module, hidden, visible)
    torch.testing.assert_close(actual, expected)
    leaves = [hidden, *module.parameters()]
    grad = torch.randn_like(actual)
    for gradient, other in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 3, (1, 2, 4)], ids=str)
def test_windows(dilation, causal):
    torch.manual_seed(0)
    length, (left, right) = 50, (4, 2)
    module = SparseSelfAttention(WIDTH, HEADS, window=(left, right), dilation=dilation, is_causal=causal)
    dilations = (dilation,) * HEADS if isinstance(dilation, int) else dilation
    visible = torch.stack([in_window(length, left, 0 if causal else right, own) for own in dilations])[None]
    check(module, visible, length)
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[1, 40:] = True
    check(module, visible & ~padding[:, None, None, :], length, key_padding_mask=padding)


@pytest.mark.parametrize("causal", [False, True])
def test_global_tokens(causal):
    torch.manual_seed(0)
    length = 40
    module = SparseSelfAttention(WIDTH, HEADS, window=3, is_causal=causal)
    padding, chosen = torch.zeros(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.bool)
    padding[0, 35:] = True
    chosen[0, [0, 20]], chosen[1, [7, 8, 39]] = True, True
    visible = in_window(length, 3, 3) | chosen[:, None, None, :] | chosen[:, None, :, None]
    if causal:
        visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
    visible = visible & ~padding[:, None, None, :]
    check(module, visible, length, key_padding_mask=padding, global_mask=chosen)
    none = torch.zeros_like(chosen)
    hidden = torch.randn(2, length, WIDTH)
    torch.testing.assert_close(module(hidden, global_mask=none), module(hidden))


def test_patterns():
    torch.manual_seed(0)
    block, length = 4, 38
    big_bird = Window(1, 1, block) | Global(1, block) | Random(2, block_size=block)
    for pattern in (big_bird, PerHead([Window(1, 0, block), Strided(3, block), big_bird])):
        module = SparseSelfAttention(WIDTH, HEADS, pattern=pattern, is_causal=True)
        blocks = pattern.blocks(-(-length // block), -(-length // block))
        visible = blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)[None, :, :length, :length]
        check(module, visible & torch.ones(length, length, dtype=torch.bool).tril(), length)


def test_equals_longformer():
    modeling = pytest.importorskip(
        "transformers.models.longformer.modeling_longformer", reason="pip install transformers"
    )
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    length, one_side = 64, 8
    config = transformers.LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[2 * one_side], attention_probs_dropout_prob=0.0
    )
    theirs = modeling.LongformerSelfAttention(config, 0).double().eval()
    ours = SparseSelfAttention(WIDTH, HEADS, window=one_side, separate_global=True).double()
    for projection, suffix in ((ours.in_proj, ""), (ours.global_in_proj, "_global")):
        layers = [getattr(theirs, name + suffix) for name in ("query", "key", "value")]
        projection.weight.data = torch.cat([layer.weight.data for layer in layers])
        projection.bias.data = torch.cat([layer.bias.data for layer in layers])
    ours.out_proj = torch.nn.Identity()
    hidden = torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
    chosen = torch.zeros(2, length, dtype=torch.bool)
    # As many in each: its layer gives NaN for a sequence with fewer in float64.
    chosen[0, [0, 30]], chosen[1, [5, 6]] = True, True
    expected = theirs(
        hidden,
        attention_mask=torch.where(chosen, 10000.0, 0.0).double(),
        is_index_masked=torch.zeros_like(chosen),
        is_index_global_attn=chosen,
        is_global_attn=True,
    )[0]
    actual = ours(hidden, global_mask=chosen)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, hidden, grad)[0], torch.autograd.grad(expected, hidden, grad)[0]
    )


def test_dropout_acts_in_training_only():
    module = SparseSelfAttention(WIDTH, HEADS, window=2, dropout=0.5)
    hidden = torch.randn(1, 10, WIDTH)
    assert not torch.equal(module(hidden), module(hidden))
    module.eval()
    assert torch.equal(module(hidden), module(hidden))


def test_bad_arguments():
    for options, message in (
        ({"num_heads": 5}, "num_heads is 5"),
        ({"dilation": (1, 2)}, "dilation is"),
        ({"dilation": 0}, "dilation is 0"),
        ({"dilation": 2, "pattern": Window(1, 1)}, "1 where a pattern is given"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ):
        with pytest.raises(ArgumentValueError, match=message):
            SparseSelfAttention(**({"embed_dim": WIDTH, "num_heads": HEADS} | options))
    module, hidden = SparseSelfAttention(WIDTH, HEADS), torch.randn(1, 5, WIDTH)
    with pytest.raises(ArgumentTypeError, match=r"global_mask\.dtype"):
        module(hidden, global_mask=torch.zeros(1, 5))
    with pytest.raises(ArgumentValueError, match=r"key_padding_mask\.shape"):
        module(hidden, torch.zeros(1, 4, dtype=torch.bool))
