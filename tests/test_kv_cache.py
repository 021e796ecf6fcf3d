"""Contiguous, paged and rolling caches against attention over whole sequences."""

import pytest
import torch
from enable_support import normal

from fusewright import functional
from fusewright.nn import KeyValueCache, MultiheadAttention, PagedKeyValueCache, RollingKeyValueCache, RotaryEmbedding
from fusewright_kernels.checks import ArgumentValueError

BATCH, HEADS, WIDTH = 3, 2, 8


def _cache(kind, capacity=24, **options):
    classes = {"contiguous": KeyValueCache, "paged": PagedKeyValueCache, "rolling": RollingKeyValueCache}
    defaults = {"contiguous": {}, "paged": {"page_size": 4}, "rolling": {"window": 10}}[kind]
    return classes[kind](BATCH, HEADS, capacity, WIDTH, **(defaults | options))


def _rows(length, seed=0):
    return normal(BATCH, HEADS, length, WIDTH, seed=seed)


def _causal(query, key, value, window=-1):
    return functional.scaled_dot_product_attention(query, key, value, window=(window, 0))


@pytest.mark.parametrize("kind", ["contiguous", "paged", "rolling"])
def test_decodes_what_the_whole_sequence_gives(kind):
    length = 60 if kind == "rolling" else 24
    query, key, value = _rows(length), _rows(length, 1), _rows(length, 2)
    expected = _causal(query, key, value, 10)
    cache, start = _cache(kind), 0
    for step in (5, 1, 1, 3, 4, *[1] * (length - 14)):
        part = slice(start, start + step)
        cache.append(key[:, :, part], value[:, :, part])
        actual = cache.attend(query[:, :, part], window=10)
        torch.testing.assert_close(actual, expected[:, :, part], rtol=1e-4, atol=1e-5)
        start += step
        assert cache.positions.tolist() == [start] * BATCH and not cache.is_empty


@pytest.mark.parametrize("kind", ["contiguous", "paged", "rolling"])
def test_sequences_of_their_own_lengths(kind):
    lengths, more = torch.tensor([4, 1, 7]), 20 if kind == "rolling" else 10
    query, key, value = _rows(7 + more), _rows(7 + more, 1), _rows(7 + more, 2)
    cache = _cache(kind)
    cache.append(key[:, :, :7], value[:, :, :7])
    cache.reset(lengths)
    assert cache.lengths.tolist() == lengths.tolist()
    for step in range(more):
        places = (torch.arange(BATCH), slice(None), lengths + step)
        new = [tensor[places].unsqueeze(2) for tensor in (query, key, value)]
        cache.append(*new[1:])
        actual = cache.attend(new[0], window=10)
        for b in range(BATCH):
            end = int(lengths[b]) + step + 1
            expected = _causal(*(tensor[b : b + 1, :, :end] for tensor in (query, key, value)), 10)
            torch.testing.assert_close(actual[b : b + 1], expected[:, :, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "rolling"])
def test_selected_sequences_go_their_own_ways(kind):
    key, value = _rows(6), _rows(6, 1)
    cache = _cache(kind)
    cache.append(key, value)
    cache.select(torch.tensor([2, 2, 0, 1]))
    rows = [2, 2, 0, 1]
    new = normal(4, HEADS, 3, WIDTH, seed=3), normal(4, HEADS, 3, WIDTH, seed=4)
    cache.append(*new)
    query = normal(4, HEADS, 1, WIDTH, seed=5)
    whole_key, whole_value = torch.cat([key[rows], new[0]], 2), torch.cat([value[rows], new[1]], 2)
    expected = functional.scaled_dot_product_attention(query, whole_key, whole_value)
    torch.testing.assert_close(cache.attend(query), expected, rtol=1e-4, atol=1e-5)


def test_pages_are_shared_copied_when_written_and_given_back():
    cache = _cache("paged", num_pages=12)
    cache.append(_rows(6), _rows(6, 1))
    assert cache.free_pages == 6
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.free_pages == 10
    cache.append(_rows(1), _rows(1, 1))
    assert cache.free_pages == 8
    cache.reset()
    assert cache.free_pages == 12 and cache.is_empty
    cache.append(_rows(12), _rows(12, 1))
    cache.append(_rows(1), _rows(1, 1))
    with pytest.raises(ArgumentValueError, match="the pages wanted is 3, expected at most the 0 free"):
        cache.append(_rows(4), _rows(4, 1))


def test_a_pool_without_a_limit_grows():
    cache, key, value = _cache("paged"), _rows(23), _rows(23, 1)
    for step in range(23):
        cache.append(key[:, :, step : step + 1], value[:, :, step : step + 1])
    assert cache.key.shape[0] == 24
    query = _rows(1, 2)
    torch.testing.assert_close(
        cache.attend(query), functional.scaled_dot_product_attention(query, key, value), rtol=1e-4, atol=1e-5
    )


def test_a_bias_on_the_logits():
    cache = _cache("contiguous", 9)
    key, value = _rows(7), _rows(7, 1)
    cache.append(key, value)
    query, bias = _rows(2, 2), normal(BATCH, HEADS, 2, 9, seed=3)
    causal = torch.ones(2, 7, dtype=torch.bool).tril(5)
    expected = functional.scaled_dot_product_attention(
        query, key, value, bias[..., :7].masked_fill(~causal, -torch.inf)
    )
    torch.testing.assert_close(cache.attend(query, bias), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"page_size": 4}, {"rolling": True}], ids=["contiguous", "paged", "rolling"])
def test_a_module_with_either_cache(options):
    attention = MultiheadAttention(
        16, 4, batch_first=True, num_kv_heads=2, rotary=RotaryEmbedding(4), window=(5, 0)
    ).eval()
    x = normal(2, 30, 16)
    expected = attention(x, x, x, need_weights=False)[0]
    cache, parts = attention.make_cache(2, 12 if "rolling" in options else 30, **options), []
    with torch.no_grad():
        for part in (x[:, :6], *x[:, 6:].split(1, 1)):
            parts.append(attention(part, part, part, need_weights=False, cache=cache)[0])
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(ArgumentValueError, match="window is 24"):
        _cache("rolling", window=24)
    with pytest.raises(ArgumentValueError, match="page_size is 0"):
        _cache("paged", page_size=0)
    with pytest.raises(ArgumentValueError, match=r"key.shape\[2\] is 15, expected at most 14"):
        _cache("rolling").append(_rows(15), _rows(15))
    with pytest.raises(ArgumentValueError, match="the cache's length is 25"):
        _cache("paged").append(_rows(25), _rows(25))
    with pytest.raises(ArgumentValueError, match="bias is given"):
        _cache("paged").attend(_rows(1), normal(1, 1, 1, 24))
    with pytest.raises(ArgumentValueError, match="rolling is True"):
        MultiheadAttention(8, 2).make_cache(1, 4, rolling=True)
