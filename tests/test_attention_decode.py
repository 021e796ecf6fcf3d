"""Attention over a key/value cache against attention over the sequences as they are."""

import pytest
import torch
from op_support import DTYPES

from fusewright import functional, testing
from fusewright_kernels import library
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
LENGTHS = torch.tensor([0, 5, 700])


def _normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _caches(dtype=torch.float32, capacity=704, key_heads=2, width=16, value_width=24):
    return (
        _normal(3, key_heads, capacity, width, dtype=dtype, seed=1),
        _normal(3, key_heads, capacity, value_width, dtype=dtype, seed=2),
    )


def _each_sequence(query, key_cache, value_cache, lengths, **options):
    """The same by one dense call per sequence in float64."""
    outputs = []
    for b, length in enumerate(lengths.tolist()):
        tensors = (query[b : b + 1], key_cache[b : b + 1, :, :length], value_cache[b : b + 1, :, :length])
        output = functional.scaled_dot_product_attention(
            *(tensor.double() for tensor in tensors), is_causal=True, enable_gqa=True,
            causal_alignment="bottom_right", **options,
        )  # fmt: skip
        outputs.append(output)
    return torch.cat(outputs)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"alibi_slopes": torch.rand(4)}, {"sinks": torch.randn(4)}],
                         ids=["plain", "softcap", "alibi", "sinks"])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 9])
@backends
def test_matches_each_sequence(backend, queries, dtype, options):
    query, (keys, values) = _normal(3, 4, queries, 16, dtype=dtype), _caches(dtype)
    output = functional.decode_attention(query, keys, values, LENGTHS, backend=backend, **options)
    expected = _each_sequence(query, keys, values, LENGTHS, **options)
    testing.assert_accurate(output, expected, magnitude=testing.rms(expected))


@backends
def test_window_sees_the_last_keys(backend):
    query, (keys, values) = _normal(3, 4, 2, 16), _caches()
    output = functional.decode_attention(query, keys, values, LENGTHS, window=70, backend=backend)
    expected = _each_sequence(query, keys, values, LENGTHS, window=(70, 0))
    testing.assert_accurate(output, expected)


@backends
def test_appends_in_place(backend):
    query, (keys, values) = _normal(3, 4, 2, 16), _caches()
    new_key, new_value = _normal(3, 2, 2, 16, seed=4), _normal(3, 2, 2, 24, seed=5)
    before = keys.clone(), values.clone()
    output = functional.decode_attention(
        query, keys, values, LENGTHS, new_key=new_key, new_value=new_value, backend=backend
    )
    for cache, old, rows in ((keys, before[0], new_key), (values, before[1], new_value)):
        for b, length in enumerate(LENGTHS.tolist()):
            assert torch.equal(cache[b, :, length : length + 2], rows[b])
            assert torch.equal(cache[b, :, :length], old[b, :, :length])
            assert torch.equal(cache[b, :, length + 2 :], old[b, :, length + 2 :])
    testing.assert_accurate(output, _each_sequence(query, keys, values, LENGTHS + 2))


@pytest.mark.parametrize("page_size", [1, 16, 100])
@backends
def test_pages_are_the_dense_cache(backend, page_size):
    query, (keys, values) = _normal(3, 4, 2, 16), _caches(capacity=800)
    pages = 800 // page_size
    order = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(3)).reshape(3, pages)

    def paged(cache):
        rows = cache.unflatten(2, (pages, page_size)).transpose(1, 2).flatten(0, 1)
        return torch.empty_like(rows).index_copy_(0, order.flatten(), rows)

    paged_keys, paged_values = paged(keys), paged(values)
    new = {"new_key": _normal(3, 2, 3, 16, seed=4), "new_value": _normal(3, 2, 3, 24, seed=5)}
    output = functional.decode_attention(
        query, paged_keys, paged_values, LENGTHS.int(), block_table=order.int(), backend=backend, **new
    )
    dense = functional.decode_attention(query, keys, values, LENGTHS, backend=backend, **new)
    torch.testing.assert_close(output, dense)
    assert torch.equal(paged_keys, paged(keys)) and torch.equal(paged_values, paged(values))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_query_and_new_key_by_their_positions(interleaved):
    query, (keys, values) = _normal(3, 4, 1, 16), _caches()
    new_key, new_value = _normal(3, 2, 1, 16, seed=4), _normal(3, 2, 1, 24, seed=5)
    angles = torch.arange(704)[:, None] * torch.tensor([1.0, 0.3, 0.01, 0.001])
    output = functional.decode_attention(
        query, keys, values, LENGTHS, new_key=new_key, new_value=new_value,
        rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=interleaved,
    )  # fmt: skip
    assert torch.equal(keys[1, :, 5, 8:], new_key[1, :, 0, 8:])  # half of the width is left as it is
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    turned = torch.polar(torch.ones(4), angles[5]) * torch.complex(new_key[1, :, 0, first], new_key[1, :, 0, second])
    torch.testing.assert_close(keys[1, :, 5, first], turned.real)
    torch.testing.assert_close(keys[1, :, 5, second], turned.imag)
    unturned = functional.decode_attention(query, keys, values, LENGTHS + 1)
    # At position 0 nothing turns.
    torch.testing.assert_close(output[0], unturned[0])
    assert not torch.allclose(output[1], unturned[1])


def test_threads_do_not_change_the_bits():
    query, (keys, values) = _normal(3, 4, 1, 16), _caches()
    testing.assert_thread_count_invariant(
        lambda *tensors: functional.decode_attention(*tensors, LENGTHS), (query, keys, values)
    )


def test_keys_behind_the_length_reach_nothing():
    query, (keys, values) = _normal(3, 4, 1, 16), _caches()
    expected = functional.decode_attention(query, keys, values, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        keys[b, :, length:] = float("nan")
        values[b, :, length:] = float("nan")
    assert torch.equal(functional.decode_attention(query, keys, values, LENGTHS), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    query, (keys, values) = _normal(3, 4, 1, 16), _caches()
    overload = library.overload("attention_decode", backend)
    torch.library.opcheck(overload, (query, keys, values, LENGTHS, None, torch.rand(1, 4), torch.rand(4), 0.2, 3.0, 50))


QUERY, (KEYS, VALUES) = _normal(3, 4, 1, 16), _caches()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"cache_seqlens": torch.tensor([0, 5, 705])}, ArgumentValueError, "cache_seqlens is [0, 5, 705]"),
        ({"cache_seqlens": torch.tensor([0, -1, 7])}, ArgumentValueError, "cache_seqlens is [0, -1, 7]"),
        ({"cache_seqlens": LENGTHS.float()}, ArgumentTypeError, "cache_seqlens.dtype is torch.float32"),
        ({"cache_seqlens": LENGTHS[:2]}, ArgumentValueError, "cache_seqlens.shape is (2,)"),
        ({"query": QUERY[0]}, ArgumentValueError, "query.ndim is 3"),
        ({"key_cache": KEYS[:2], "value_cache": VALUES[:2]}, ArgumentValueError, "key_cache.shape[0] is 2"),
        ({"value_cache": VALUES[:, :, :9]}, ArgumentValueError, "value_cache.shape[2] is 9"),
        ({"new_key": KEYS[:, :, :1]}, ArgumentValueError, "new_value is None"),
        (
            {"new_key": KEYS[:, :, :1], "new_value": VALUES[:, :, :2]}, ArgumentValueError,
            "new_value.shape is (3, 2, 2, 24)",
        ),
        ({"block_table": torch.full((3, 4), 9)}, ArgumentValueError, "block_table is"),
        ({"rotary_cos": torch.ones(704, 4)}, ArgumentValueError, "rotary_sin is None"),
        (
            {"rotary_cos": torch.ones(704, 9), "rotary_sin": torch.ones(704, 9)}, ArgumentValueError,
            "rotary_cos.shape is (704, 9)",
        ),
        ({"query": QUERY.clone().requires_grad_()}, ArgumentValueError, "query.requires_grad is True"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, message):
    arguments = {"query": QUERY, "key_cache": KEYS, "value_cache": VALUES, "cache_seqlens": LENGTHS} | changes
    with pytest.raises(error) as caught:
        functional.decode_attention(**arguments)
    assert message in str(caught.value)
