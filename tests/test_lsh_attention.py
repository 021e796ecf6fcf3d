"""LSH attention's kernels against their oracle, and what must hold of them whatever the numbers are."""

import itertools

import pytest
import torch
from torch import Tensor

from fusewright import functional, testing
from fusewright.testing.case import evaluate
from fusewright.testing.cases.lsh_attention import cases_of
from fusewright_kernels import library, native
from fusewright_kernels.lsh_attention import reference
from fusewright_kernels.lsh_attention.function import LshAttention

CASES = list(cases_of("lsh_attention"))
ISAS = native.cpu_isas() if native.cpu_unavailable_reason() is None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """query_key (B, H, T, D) and value (B, H, T, DV) for sizes B, H, T, D, DV."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, width, value_width = sizes
    made = (torch.randn(batch, heads, length, size, generator=generator) for size in (width, value_width))
    query_key, value = (tensor.to(dtype) for tensor in made)
    return query_key, value


def failures(case, backend):
    return {name: verdict.failures for name, verdict in evaluate(case, backend).items() if not verdict.passed}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cpu(case):
    assert not failures(case, "cpu")


@pytest.mark.parametrize("isa", ISAS[1:])
def test_other_instruction_sets(isa):
    """Every third case, so that each width and feature comes up for some dtype."""
    best = native.cpu_isa()
    native.select_cpu_isa(isa)
    try:
        found = {case.id: failures(case, "cpu") for case in CASES[::3]}
    finally:
        native.select_cpu_isa(best)
    assert not {case: results for case, results in found.items() if results}


@pytest.mark.parametrize("windows", [(1, 0), (0, 1), (2, 2)])
@pytest.mark.parametrize(("length", "chunk_length"), [(1, 4), (7, 4), (16, 4), (37, 16)])
def test_the_reference_is_a_softmax_over_multiplicities(length, chunk_length, windows):
    """Forward and written-out backward against the dense statement of the same, differentiated by autograd."""
    query_key, value = (tensor.double().requires_grad_() for tensor in tensors(2, 2, length, 5, 3))
    padding = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.3
    for rounds, causal, across, duplicates, mask in itertools.product(
        (1, 3), (False, True), (False, True), (False, True), (None, padding)
    ):
        buckets = torch.randint(0, 6, (2, 2, rounds, length), generator=torch.Generator().manual_seed(3))
        order, given = reference.sort_positions(buckets), None if across else buckets
        counts = reference.multiplicities(order, given, mask, chunk_length, *windows, causal, duplicates)
        expected = reference.dense_attention(query_key, value, counts, 0.7)
        output, _, lse = LshAttention.apply(
            query_key, value, order, given, mask, None, chunk_length, *windows, causal, 0.7, duplicates, 0.0, True,
            "reference",
        )  # fmt: skip
        cotangents = [torch.randn_like(output), torch.randn_like(lse)]
        for actual, other in zip((output, lse), expected, strict=True):
            torch.testing.assert_close(actual, other)
        leaves = (query_key, value)
        for actual, other in zip(
            torch.autograd.grad((output, lse), leaves, cotangents),
            torch.autograd.grad(expected, leaves, cotangents),
            strict=True,
        ):
            torch.testing.assert_close(actual, other)


@pytest.mark.parametrize("chunk_length", [30, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_redrawn_from_its_seed(dtype, chunk_length):
    query_key, value = tensors(2, 2, 150, 32, 24, dtype=dtype)
    buckets = torch.randint(0, 8, (2, 2, 3, 150), generator=torch.Generator().manual_seed(4))
    results = []
    for backend, kind in (("cpu", dtype), ("reference", torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in (query_key, value)]
        output = functional.lsh_attention(
            *leaves, buckets=buckets, chunk_length=chunk_length, dropout_p=0.3, seed=5, scale=0.2, backend=backend
        )
        grad = torch.ones_like(output)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for actual, expected in zip(*results, strict=True):
        testing.assert_accurate(actual, expected, "gradient", magnitude=testing.rms(expected))


def test_everything_dropped_gives_zeros():
    query_key, value = tensors(1, 1, 100, 8, 8)
    output = functional.lsh_attention(query_key, value, chunk_length=16, dropout_p=1.0, backend="cpu")
    assert output.eq(0).all()


def test_a_row_that_meets_nobody_is_its_own_value():
    query_key, value = tensors(1, 2, 100, 16, 8)
    output, lse = functional.lsh_attention(query_key, value, chunk_length=16, is_causal=True, return_lse=True, seed=1)
    assert torch.equal(output[:, :, 0], value[:, :, 0])
    torch.testing.assert_close(lse[:, :, 0], query_key[:, :, 0].norm(dim=-1))
    alone = torch.arange(100).expand(1, 2, 3, 100)
    output = functional.lsh_attention(
        query_key, value, buckets=alone, chunk_length=16, attend_across_buckets=False, is_causal=False
    )
    assert torch.equal(output, value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_padding_reaches_nobody_whatever_it_holds(backend):
    """A padded query still meets keys, so only what is finite there leaves their gradients alone."""
    padding = torch.zeros(1, 90, dtype=torch.bool)
    padding[:, 60:] = True
    results = []
    for filler in (0.0, 3.0, float("nan")):
        query_key, value = tensors(1, 2, 90, 16, 8)
        for tensor in (query_key, value):
            tensor[:, :, 60:] = filler
        leaves = [query_key.requires_grad_(), value.requires_grad_()]
        output = functional.lsh_attention(*leaves, chunk_length=16, seed=3, key_padding_mask=padding, backend=backend)[
            :, :, :60
        ]
        results.append([output, *(grad[:, :, :60] for grad in torch.autograd.grad(output.square().sum(), leaves))])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2][0], results[0][0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_reaches_only_rows_that_meet_it(dtype, backend):
    query_key, value = tensors(1, 1, 200, 16, 8, dtype=dtype)
    buckets = torch.randint(0, 10, (1, 1, 2, 200), generator=torch.Generator().manual_seed(0))
    counts = reference.multiplicities(reference.sort_positions(buckets), None, None, 16, 1, 0, True, True)
    value[:, :, 77] = float("nan")
    query_key[:, :, 31] = float("inf")
    output = functional.lsh_attention(
        query_key, value, buckets=buckets, chunk_length=16, is_causal=True, backend=backend
    )
    meets = (counts[0, 0, :, [77, 31]] > 0).any(-1)
    meets[[31, 77]] |= True
    assert output[0, 0, ~meets].isfinite().all()
    assert output[0, 0, counts[0, 0, :, 77] > 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_without_a_direction_have_finite_gradients(dtype):
    query_key, value = tensors(1, 1, 70, 8, 8, dtype=dtype)
    query_key[:, :, ::2] = 0.0
    query_key[:, :, 1::4] = query_key[:, :, 1:2]
    leaves = [query_key.requires_grad_(), value.requires_grad_()]
    output, lse = functional.lsh_attention(*leaves, chunk_length=8, return_lse=True, backend="cpu")
    for result in (output, lse, *torch.autograd.grad(output.sum() + lse.sum(), leaves)):
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_batch(dtype):
    query_key, value = tensors(2, 3, 1500, 16, 16, dtype=dtype)
    results = []
    for threads, batch in ((1, 2), (2, 2), (2, 1)):
        torch.set_num_threads(threads)
        leaves = [tensor[:batch].clone().requires_grad_() for tensor in (query_key, value)]
        output = functional.lsh_attention(*leaves, seed=7, chunk_length=32, is_causal=True, backend="cpu")
        results.append([output[:1], *(grad[:1] for grad in torch.autograd.grad(output.sum(), leaves))])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_any_strides():
    packed = torch.randn(2, 150, 3, 2, 24)
    query_key, value = packed[:, :, 0].transpose(1, 2), packed[:, :, 2, :, ::2].transpose(1, 2)
    options = {"chunk_length": 16, "seed": 2, "backend": "cpu"}
    strided = functional.lsh_attention(query_key, value, **options)
    assert torch.equal(strided, functional.lsh_attention(query_key.contiguous(), value.contiguous(), **options))


@pytest.mark.parametrize("sizes", [(0, 2, 5, 4, 3), (2, 0, 5, 4, 3), (2, 2, 0, 4, 3), (1, 1, 5, 0, 3), (1, 1, 5, 4, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_sizes(sizes, backend):
    leaves = [tensor.requires_grad_() for tensor in tensors(*sizes)]
    output = functional.lsh_attention(*leaves, chunk_length=2, backend=backend)
    assert output.shape == (*sizes[:3], sizes[4])
    output.sum().backward()
    assert leaves[0].grad.shape == leaves[0].shape


# ---- hashing and sorting ----


@pytest.mark.parametrize("columns", [(3,), (8,), (200,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash(dtype, columns):
    vectors, _ = tensors(2, 3, 130, 20, 1, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    rotations = [torch.randn(3, 20, 4, count, generator=generator) for count in columns]
    padding = torch.rand(2, 130, generator=generator) < 0.2
    expected = reference.hash_vectors(vectors.double(), rotations, padding)
    actual = functional.lsh_hash(vectors, rotations, key_padding_mask=padding, backend="cpu")
    assert torch.equal(actual, expected)


def test_hash_of_ties_and_of_nothing_is_valid():
    vectors = torch.zeros(1, 1, 4, 6)
    vectors[:, :, 2], vectors[:, :, 3] = float("nan"), float("inf")
    buckets = functional.lsh_hash(vectors, torch.randn(1, 6, 3, 5), backend="cpu")
    assert buckets[..., :3].eq(0).all() and buckets.ge(0).all() and buckets.lt(10).all()


@pytest.mark.parametrize("largest", [1, 100, 5000, 2**30])
def test_sort_is_stable(largest):
    library.overload("lsh_sort", "cpu")
    buckets = torch.randint(0, largest, (2, 1, 3, 700), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.ops.fusewright.lsh_sort.cpu(buckets), reference.sort_positions(buckets))


def test_seed_decides_rotations_and_leaves_the_generator_alone():
    query_key, value = tensors(1, 2, 300, 16, 16)
    state = torch.random.get_rng_state()
    first, again, other = (functional.lsh_attention(query_key, value, chunk_length=16, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    drawn = [functional.lsh_attention(query_key, value, chunk_length=16) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(functional.lsh_attention(query_key, value, chunk_length=16), drawn[0])
    assert not torch.equal(*drawn)


def test_close_vectors_find_each_other():
    """Eight rounds bring nearly all of the attention to where it belongs."""
    generator = torch.Generator().manual_seed(0)
    query_key = torch.randn(1, 1, 512, 32, generator=generator).repeat(1, 1, 2, 1) * 2
    value = torch.randn(1, 1, 1024, 32, generator=generator)
    output = functional.lsh_attention(query_key, value, n_hashes=8, seed=0)
    partner = value.roll(512, dims=2)
    assert (output - partner).norm() < 0.05 * partner.norm()
