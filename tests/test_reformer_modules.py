"""Modules of the Reformer but for its reversible layers."""

import math

import pytest
import torch

from fusewright import functional
from fusewright.nn import (
    AxialPositionalEmbedding,
    ChunkedFeedForward,
    LearnedPositionalEmbedding,
    LSHSelfAttention,
    SinusoidalPositionalEncoding,
)
from fusewright_kernels.checks import ArgumentValueError


def test_lsh_self_attention_is_the_functional_between_projections():
    torch.manual_seed(0)
    module = LSHSelfAttention(12, 3, 5, n_hashes=2, chunk_length=8, is_causal=True, dropout=0.5).eval()
    hidden, padding = torch.randn(2, 30, 12), torch.zeros(2, 30, dtype=torch.bool)
    padding[1, 20:] = True
    query_key, value = (
        layer(hidden).unflatten(-1, (3, 5)).transpose(1, 2) for layer in (module.query_key_proj, module.value_proj)
    )
    expected = functional.lsh_attention(
        query_key, value, n_hashes=4, chunk_length=8, is_causal=True, key_padding_mask=padding, seed=3
    )
    actual = module(hidden, padding, n_hashes=4, seed=3)
    torch.testing.assert_close(actual, module.out_proj(expected.transpose(1, 2).flatten(2)))
    assert "n_hashes=2" in repr(module)


def test_lsh_self_attention_drops_in_training_only():
    module = LSHSelfAttention(8, 2, chunk_length=8, dropout=0.5)
    hidden = torch.randn(1, 40, 8)
    outputs = [module(hidden, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(module.eval()(hidden, seed=1), outputs[0])


def test_lsh_self_attention_errors():
    with pytest.raises(ArgumentValueError, match="num_heads is 3, expected a divisor of embed_dim, 8"):
        LSHSelfAttention(8, 3)
    with pytest.raises(ArgumentValueError, match=r"hidden.shape is \(2, 5, 7\)"):
        LSHSelfAttention(8, 2)(torch.randn(2, 5, 7))


def test_sinusoidal_encoding():
    module = SinusoidalPositionalEncoding(6)
    encoded = module(torch.zeros(2, 9, 6), offset=100_000)
    for position in range(9):
        for pair in range(3):
            angle = (100_000 + position) * 10000 ** (-2 * pair / 6)
            assert abs(encoded[0, position, 2 * pair].item() - math.sin(angle)) < 1e-6
            assert abs(encoded[1, position, 2 * pair + 1].item() - math.cos(angle)) < 1e-6
    assert SinusoidalPositionalEncoding(5)(torch.zeros(1, 3, 5, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_learned_embedding():
    module = LearnedPositionalEmbedding(10, 4)
    hidden = torch.randn(2, 3, 4)
    torch.testing.assert_close(module(hidden, offset=7), hidden + module.weight[7:])
    with pytest.raises(ArgumentValueError, match="the last position is 10, expected less than max_positions, 10"):
        module(hidden, offset=8)


def test_axial_embedding():
    module = AxialPositionalEmbedding((3, 4), (2, 5))
    embedded = module(torch.zeros(1, 10, 7), offset=1)[0]
    for row, position in enumerate(range(1, 11)):
        expected = torch.cat([module.weights[0][position // 4], module.weights[1][position % 4]])
        assert torch.equal(embedded[row], expected)
    with pytest.raises(ArgumentValueError, match=r"the grid \(3, 4\)"):
        module(torch.zeros(1, 13, 7))
    with pytest.raises(ArgumentValueError, match="one size for each axis"):
        AxialPositionalEmbedding((3, 4), (7,))


@pytest.mark.parametrize("chunk_length", [1, 4, 100])
def test_chunked_feed_forward(chunk_length):
    torch.manual_seed(0)
    whole = ChunkedFeedForward(6, 10)
    chunked = ChunkedFeedForward(6, 10, chunk_length)
    chunked.load_state_dict(whole.state_dict())
    hidden = torch.randn(2, 11, 6)
    torch.testing.assert_close(chunked(hidden), whole(hidden))
