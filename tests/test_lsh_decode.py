"""LSH attention of one new position: the last row of the full call, in the functional and in the module."""

import itertools

import pytest
import torch

from fusewright import functional, testing
from fusewright.nn import LSHCache, LSHSelfAttention
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(length, rounds=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    tensors = (torch.randn(2, 2, length, width, generator=generator).to(dtype) for width in (8, 5))
    return *tensors, torch.randint(0, 6, (2, 2, rounds, length), generator=generator)


@pytest.mark.parametrize("window", [(1, 0), (0, 2), (9, 8)], ids=str)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 40, 67])
@pytest.mark.parametrize("rounds", [1, 3])
def test_is_the_last_row_of_the_full_call(rounds, length, window):
    query_key, value, buckets = inputs(length, rounds)
    padding = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.3
    for across, duplicates, mask in itertools.product((True, False), (True, False), (None, padding)):
        options = {
            "chunk_length": 8, "chunks_before": window[0], "chunks_after": window[1], "scale": 0.6,
            "attend_across_buckets": across, "allow_duplicates": duplicates, "key_padding_mask": mask,
            "return_lse": True,
        }  # fmt: skip
        row, lse = functional.lsh_decode_attention(query_key, value, buckets, **options)
        for causal in (True, False):
            full, full_lse = functional.lsh_attention(query_key, value, buckets=buckets, is_causal=causal, **options)
            torch.testing.assert_close(row, full[:, :, -1:])
            torch.testing.assert_close(lse, full_lse[:, :, -1:])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_dtype_against_the_oracle(dtype):
    query_key, value, buckets = inputs(70, dtype=dtype)
    row = functional.lsh_decode_attention(query_key, value, buckets, chunk_length=16)
    full = functional.lsh_attention(
        query_key.double(), value.double(), buckets=buckets, chunk_length=16, is_causal=True
    )
    assert row.dtype is dtype
    testing.assert_accurate(row, full[:, :, -1:])


def test_only_rows_that_are_met_are_read():
    """A NaN in a row that the full call does not give to the last position leaves no trace."""
    query_key, value, buckets = inputs(70, rounds=1)
    row = functional.lsh_decode_attention(query_key, value, buckets, chunk_length=4)
    order = buckets.sort(dim=-1, stable=True).indices
    place = order.eq(69).int().argmax(-1)
    for b, h in itertools.product(range(2), range(2)):
        chunk = int(place[b, h]) // 4
        for other in set(range(18)) - {chunk, (chunk - 1) % 18}:
            positions = order[b, h, 0, 4 * other : 4 * other + 4]
            query_key[b, h, positions], value[b, h, positions] = float("nan"), float("nan")
    assert torch.equal(functional.lsh_decode_attention(query_key, value, buckets, chunk_length=4), row)


@pytest.mark.parametrize("options", [{}, {"chunks_after": 1, "scale": 0.3}, {"attend_across_buckets": False},
                                     {"allow_duplicates": False, "n_buckets": (4, 4)}], ids=str)  # fmt: skip
@torch.no_grad()
def test_a_module_decodes_what_it_would_compute_in_full(options):
    torch.manual_seed(0)
    module = LSHSelfAttention(12, 3, n_hashes=2, chunk_length=4, is_causal=True, **options).eval()
    hidden = torch.randn(2, 23, 12)
    cache = module.make_cache(2, capacity=30, seed=5)
    outputs = [module(hidden[:, begin:end], cache=cache) for begin, end in ((0, 6), (6, 7), (7, 20), (20, 23))]
    decoded = torch.cat(outputs, dim=1)
    buckets = cache.filled()[2]
    torch.testing.assert_close(decoded[:, :6], module(hidden[:, :6], buckets=buckets[..., :6]))
    for length in range(7, 24):
        full = module(hidden[:, :length], buckets=buckets[..., :length])
        torch.testing.assert_close(decoded[:, length - 1], full[:, -1])
    again = module.make_cache(2, capacity=30, seed=5)
    assert torch.equal(module(hidden[:, :6], cache=again), outputs[0])
    cache.reset()
    assert cache.length == 0 and torch.equal(module(hidden[:, :6], cache=cache), outputs[0])


def test_bad_arguments():
    module = LSHSelfAttention(12, 3, is_causal=True)
    cache, hidden = module.make_cache(2, 4), torch.zeros(2, 5, 12)
    query_key, value, buckets = inputs(9)
    both_ways = LSHSelfAttention(12, 3)
    calls = [
        (
            lambda: functional.lsh_decode_attention(query_key[:, :, :0], value[:, :, :0], buckets[..., :0]),
            "shape[2] is 0",
        ),
        (lambda: functional.lsh_decode_attention(query_key, value, buckets[..., :5]), "buckets.shape"),
        (lambda: functional.lsh_decode_attention(query_key, value, buckets, chunk_length=0), "chunk_length is 0"),
        (lambda: module(hidden, cache=cache), "requires_grad is True"),
        (lambda: module(hidden, cache=3), "cache is a int"),
        (lambda: module(hidden, cache=cache, seed=3), "seed is given"),
        (lambda: both_ways(hidden, cache=cache), "is_causal is False"),
        (lambda: cache.append(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4)), "the cache's length is 5"),
        (lambda: cache.append(torch.zeros(2, 3, 1, 5), torch.zeros(2, 3, 1, 4)), "query_key.shape"),
        (lambda: LSHCache(1, 1, 8, 4, dtype=torch.float16).append(*[torch.zeros(1, 1, 1, 4)] * 2), "query_key.dtype"),
    ]
    for call, message in calls:
        with pytest.raises((ArgumentValueError, ArgumentTypeError)) as caught:
            call()
        assert message in str(caught.value)
