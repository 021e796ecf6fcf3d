"""CUDA attention over a cache on a CPU, in the emulator, against the plain formula."""

import ctypes

import emulated_attention as emulated
import emulation_support
import pytest
import torch
from emulated_attention import Fault, Mutant
from torch import Tensor

from fusewright import functional, testing
from fusewright_kernels import dispatch

pytestmark = emulation_support.needs_emulator

LENGTHS = (0, 2, 300)
CAPACITY = 336


def _normal(*size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _inputs(
    dtype: torch.dtype, heads: int, key_heads: int, queries: int, width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, caches whose rows behind the last are NaN, lengths."""
    lengths = torch.tensor(LENGTHS)
    caches = [
        _normal(len(LENGTHS), key_heads, CAPACITY, columns, dtype=dtype, seed=seed)
        for seed, columns in enumerate((width, value_width))
    ]
    for cache in caches:
        for b, length in enumerate(LENGTHS):
            cache[b, :, length:] = float("nan")
    query = _normal(len(LENGTHS), heads, queries, width, dtype=dtype, seed=9)
    return query, caches[0], caches[1], lengths


def _in_pages(cache: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cache in pages of ``size`` in another order, and their table."""
    batch, heads, capacity, width = cache.shape
    count = capacity // size
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(size))
    pages = cache.view(batch, heads, count, size, width).transpose(1, 2).reshape(-1, heads, size, width)
    return pages[order].contiguous(), torch.argsort(order).view(batch, count)


def _check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    testing.assert_accurate(actual[0], expected[0], magnitude=testing.rms(expected[0]))
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-5, atol=1e-5)


def _oracle(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    wide = [tensor.double().nan_to_num() for tensor in (query, keys, values)]
    return functional.decode_attention(*wide, lengths, return_lse=True, **options)


OPTIONS = {
    "plain": {},
    "window": {"window": 30},
    "softcap and sinks": {"softcap": 4.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -2.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.3, 0.0, 1.0])},
}


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float16, "plain"), *((torch.bfloat16, name) for name in OPTIONS)], ids=str
)
def test_heads_widths_and_pages(dtype, name):
    with emulation_support.cuda_serves_the_cpu():
        options = {key: value.clone() if isinstance(value, Tensor) else value for key, value in OPTIONS[name].items()}
        for seed, (key_heads, queries, widths) in enumerate([(6, 1, (64, 64)), (2, 3, (128, 128)), (1, 4, (80, 24))]):
            emulation_support.set_seed(seed)
            query, keys, values, lengths = _inputs(dtype, 6, key_heads, queries, *widths)
            expected = _oracle(query, keys, values, lengths, **options)
            actual = functional.decode_attention(
                query, keys, values, lengths, return_lse=True, backend="cuda", **options
            )
            _check(actual, expected)
            size = (16, 48, 112)[seed]
            key_pages, table = _in_pages(keys, size)
            value_pages, _ = _in_pages(values, size)
            paged = functional.decode_attention(
                query, key_pages, value_pages, lengths, block_table=table, return_lse=True, backend="cuda", **options
            )
            assert testing.bits_equal(paged[0], actual[0])
            assert testing.bits_equal(paged[1], actual[1])


def test_a_row_does_not_depend_on_its_batch_or_the_schedule():
    with emulation_support.cuda_serves_the_cpu():
        query, keys, values, lengths = _inputs(torch.bfloat16, 4, 2, 2, 64, 64)
        whole = functional.decode_attention(query, keys, values, lengths, backend="cuda")
        for seed in range(1, 11):
            emulation_support.set_seed(seed)
            alone = functional.decode_attention(query[2:], keys[2:], values[2:], lengths[2:], backend="cuda")
            assert testing.bits_equal(alone, whole[2:])


def test_what_is_hidden_from_a_query_reaches_none_of_its_results():
    """The last key and value are special: only the last query sees them."""
    with emulation_support.cuda_serves_the_cpu():
        query, keys, values, lengths = _inputs(torch.bfloat16, 4, 2, 3, 64, 64)
        expected = _oracle(query, keys, values, lengths)
        for special in (float("nan"), float("inf")):
            special_keys, special_values = keys.clone(), values.clone()
            special_keys[2, :, 299, 0], special_values[2, :, 299] = special, special
            output = functional.decode_attention(query, special_keys, special_values, lengths, backend="cuda")
            testing.assert_accurate(output[..., :2, :], expected[0][..., :2, :])
            assert not output[2, :, 2].isfinite().any()


def test_calls_that_it_does_not_take():
    with emulation_support.cuda_serves_the_cpu():
        query, keys, values, lengths = _inputs(torch.bfloat16, 4, 2, 1, 72, 64)
        with pytest.raises(dispatch.RefusedBackendError, match="head dimensions are 68 and 64"):
            functional.decode_attention(
                query[..., :68].contiguous(), keys[..., :68].contiguous(), values, lengths, backend="cuda"
            )
        with pytest.raises(dispatch.RefusedBackendError, match="multiples of 16 bytes"):
            functional.decode_attention(query[..., 4:68], keys[..., 4:68], values, lengths, backend="cuda")


PART = "attention_decode_part.cuh"
JOIN = "attention_decode_join.cuh"
FAULTS = {
    "warps joined before they have written": Fault(PART, "__syncthreads();", "", "::Results"),
    "keys behind the last": Fault(PART, "key <= position_[r] && key < end", "true", None),
    "keys of later queries": Fault(PART, "key <= position_[r]", "true", None),
    "values of other keys": Fault(PART, "i % 2 + 8 * (i / 2)", "i / 2 + 8 * (i % 2)", None),
    "sums not moved to the larger reference": Fault(PART, "factors[i / 2]", "1.0f", None),
    "parts that are not there": Fault(JOIN, "part < parts", "part < parts + 1", "out of range"),
    "parts not moved to one reference": Fault(JOIN, "references[part] - reference", "0.0f", None),
}


@pytest.fixture(scope="module")
def mutant(tmp_path_factory) -> Mutant:
    return Mutant(tmp_path_factory.mktemp("mutant"), "attention_decode_mutant.cu", FAULTS)


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_faults_in_the_kernels_are_found(mutant, name):
    heads, queries, length, capacity = 4, 3, 261, 512
    query, keys, values = (
        _normal(*shape, dtype=torch.bfloat16, seed=seed)
        for seed, shape in enumerate([(heads, queries, 64), (capacity, 64), (capacity, 64)])
    )
    given = [query, keys, values, torch.tensor([length])]
    results = [torch.full_like(query, float("nan")), torch.full((2, heads, queries), float("nan"))]
    results.append(torch.full((heads * queries * 2 * (64 + 2),), float("nan")))
    oracle = functional.decode_attention(
        query[None].double(), keys[None, None].double(), values[None, None].double(), given[3]
    )
    mutant.switch_on(name)
    for seed in range(1, 4):
        emulation_support.set_seed(seed)
        with (
            emulation_support.buffers(**{f"input {i}": tensor for i, tensor in enumerate(given)}, writable=False),
            emulation_support.buffers(**{f"result {i}": tensor for i, tensor in enumerate(results)}, written=False),
        ):
            pointers = (ctypes.c_void_p * 7)(*(tensor.data_ptr() for tensor in [*given, *results]))
            sizes = (ctypes.c_int64(size) for size in (heads, queries, capacity))
            error = mutant.library.attention_decode(pointers, *sizes)
        right = bool(testing.error_in_u(results[0][None], oracle) < 2.0)
        report = None if name is None else FAULTS[name].report
        if report is None:
            assert (error, right) == (0, name is None), emulation_support.report()
        else:
            assert error == emulated.LAUNCH_FAILURE
            assert report in emulation_support.report()
