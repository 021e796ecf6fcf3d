"""Triton kernels of LSH attention against the float64 formula; under Triton's interpreter where there is no GPU."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import patch_language_once_per_launch

from fusewright import functional
from fusewright.testing import assert_accurate, bits_equal, budget_of
from fusewright.testing.case import evaluate
from fusewright.testing.cases.lsh_attention import LshAttentionCase
from fusewright_kernels import library, triton_support
from fusewright_kernels.lsh_attention import backend_reference, reference, tiles
from fusewright_kernels.matrix_tiles import Tile, padded

pytestmark = pytest.mark.skipif(
    triton_support.unavailable_reason() is not None, reason=str(triton_support.unavailable_reason())
)

DEVICE = "cpu" if triton_support.INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INFINITY = float("nan"), float("inf")
B, H, R, T = 1, 1, 2, 37

forward = library.overload("lsh_attention_forward", "triton")
backward = library.overload("lsh_attention_backward", "triton")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_language_once_per_launch(monkeypatch)


@pytest.fixture(autouse=True)
def short_sort_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row; and the interpreter takes a second for a block as long as the shipped ones."""
    monkeypatch.setattr(tiles, "SORT_BLOCK", 32)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a chunk has several, and wide rows several pieces."""

    def tile(itemsize: int, d: int, dv: int, architecture: int, by_pair: bool, chunk: int) -> Tile:
        return Tile(16, 16, min(padded(d), 32), min(padded(dv), 32), 4, 1)

    monkeypatch.setattr(tiles, "forward_tile", tile)
    monkeypatch.setattr(tiles, "backward_tile", tile)


@dataclass(frozen=True)
class Options:
    """The arguments of the op behind query_key and value, but that ``buckets`` serve for sorting as well."""

    buckets: Tensor
    across: bool = True
    key_padding_mask: Tensor | None = None
    seed: Tensor | None = None
    chunk_length: int = 16
    before: int = 1
    after: int = 0
    is_causal: bool = False
    scale: float = 0.3
    allow_duplicates: bool = True
    dropout_p: float = 0.0

    def arguments(self) -> tuple[Any, ...]:
        order = reference.sort_positions(self.buckets)
        return (
            order, None if self.across else self.buckets, self.key_padding_mask, self.seed, self.chunk_length,
            self.before, self.after, self.is_causal, self.scale, self.allow_duplicates, self.dropout_p,
        )  # fmt: skip


def options(rounds: int = R, length: int = T, batch: int = B, heads: int = H, **changes: Any) -> Options:
    return Options(torch.randint(0, 5, (batch, heads, rounds, length), device=DEVICE), **changes)


def inputs(
    width: int = 16,
    value_width: int = 16,
    length: int = T,
    batch: int = B,
    heads: int = H,
    dtype: torch.dtype = DTYPES[0],
) -> list[Tensor]:
    return [torch.randn(batch, heads, length, size, device=DEVICE).to(dtype) for size in (width, value_width)]


def run(tensors: list[Tensor], options: Options, grad_output: Tensor, grad_lse: Tensor | None) -> list[Tensor]:
    arguments = options.arguments()
    output, statistics = forward(*tensors, *arguments)
    return [output, statistics, *backward(grad_output, grad_lse, output, statistics, *tensors, *arguments)]


def check(tensors: list[Tensor], options: Options, with_lse: bool = True) -> list[Tensor]:
    """Forward and both gradients of one call against the plain formula in float64."""
    query_key, value = tensors
    grad_output = torch.randn_like(value)
    grad_lse = torch.randn(query_key.shape[:3], device=DEVICE) if with_lse else None
    results = run(tensors, options, grad_output, grad_lse)
    doubles = [tensor.double() for tensor in tensors]
    arguments = options.arguments()
    expected = backend_reference.lsh_attention_forward(*doubles, *arguments)
    gradients = backend_reference.lsh_attention_backward(
        grad_output.double(), None if grad_lse is None else grad_lse.double(), *expected, *doubles, *arguments
    )
    budget = budget_of(query_key.dtype, interpreted=triton_support.INTERPRETED)
    assert_accurate(results[0], expected[0], budget=budget, name="output")
    lse, expected_lse = (backend_reference.log_sum_exp(both.double()) for both in (results[1], expected[1]))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    for name, actual, exact in zip(("grad_query_key", "grad_value"), results[2:], gradients, strict=True):
        assert_accurate(actual, exact, "gradient", budget=budget, name=name)
    return results


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, causal: bool) -> None:
    check(inputs(64, 64, dtype=dtype), options(is_causal=causal))


# Padded rows of either operand, and rows in several pieces: past 32 columns in float32, past 128 in two bytes, in the
# forward past 256.
WIDTHS = [
    (torch.float32, (1, 1)), (torch.float32, (3, 5)), (torch.float32, (16, 70)), (torch.float32, (70, 16)),
    (torch.bfloat16, (1, 1)), (torch.bfloat16, (3, 5)), (torch.bfloat16, (70, 16)), (torch.bfloat16, (80, 257)),
]  # fmt: skip


@pytest.mark.parametrize("dtype, widths", WIDTHS, ids=str)
def test_widths(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    """By the public case, which knows what cancels: of one column nearly all of a key's gradient does."""
    case = LshAttentionCase((1, 1, 21, *widths), (2, 8, 1, 0), dtype, ("causal",))
    judgements = evaluate(case, "triton", DEVICE, interpreted=triton_support.INTERPRETED)
    assert not {name: judgement.failures for name, judgement in judgements.items() if not judgement.passed}


def test_pieces_of_wide_rows(small_tiles: None) -> None:
    check(inputs(70, 40, length=21), options(length=21, is_causal=True))


@pytest.mark.parametrize("length", [1, 16, 17, 33])
@pytest.mark.parametrize("rounds", [1, 3])
def test_lengths_and_rounds(rounds: int, length: int) -> None:
    check(inputs(length=length, batch=2), options(rounds, length, 2, is_causal=rounds == 3), with_lse=rounds == 1)


WINDOWS = [(0, 0), (0, 1), (2, 1), (5, 4)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window: tuple[int, int]) -> None:
    """The last one is longer than the ring, so that chunks meet more than once."""
    check(inputs(length=30), options(length=30, chunk_length=15, before=window[0], after=window[1]))


FEATURES: dict[str, Any] = {
    "causal": lambda: {"is_causal": True},
    "same_bucket": lambda: {"across": False},
    "padding": lambda: {"key_padding_mask": torch.rand(B, T, device=DEVICE) < 0.3},
    "no_duplicates": lambda: {"allow_duplicates": False},
    "dropout": lambda: {"seed": torch.tensor([2**40 + 7], device=DEVICE), "dropout_p": 0.3},
    "odd_chunks": lambda: {"chunk_length": 7, "after": 1},
    "long_window": lambda: {"chunk_length": 20, "before": 3, "after": 1},
}
PAIRS = [
    ("causal", "same_bucket"), ("causal", "padding"), ("causal", "no_duplicates"), ("causal", "dropout"),
    ("same_bucket", "padding"), ("same_bucket", "no_duplicates"), ("dropout", "odd_chunks"),
    ("no_duplicates", "long_window"), ("dropout", "no_duplicates"), ("same_bucket", "dropout"),
    ("same_bucket", "long_window"),
]  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_features(small_tiles: None, feature: str) -> None:
    check(inputs(), options(**FEATURES[feature]()))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs_of_features(small_tiles: None, pair: tuple[str, str]) -> None:
    check(inputs(), options(**FEATURES[pair[0]]() | FEATURES[pair[1]]()))


def test_all_features_in_the_shipped_tiles() -> None:
    features: dict[str, Any] = {}
    for name in ("causal", "same_bucket", "padding", "no_duplicates", "dropout"):
        features |= FEATURES[name]()
    check(inputs(dtype=torch.bfloat16), options(**features))


def test_a_row_that_meets_nobody_is_its_own_value(small_tiles: None) -> None:
    tensors, grad_output, grad_lse = inputs(), torch.randn(B, H, T, 16), torch.randn(B, H, T)
    alone = replace(options(), buckets=torch.arange(T).expand(B, H, R, T), across=False)
    output, statistics, grad_query_key, grad_value = run(tensors, alone, grad_output, grad_lse)
    assert torch.equal(output, tensors[1]) and torch.equal(grad_value, grad_output)
    torch.testing.assert_close(backend_reference.log_sum_exp(statistics), 0.3 * tensors[0].norm(dim=-1))
    expected = 0.3 * grad_lse[..., None] * torch.nn.functional.normalize(tensors[0], dim=-1)
    torch.testing.assert_close(grad_query_key, expected)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("across, special", [(True, NAN), (False, INFINITY)])
def test_special_values_reach_only_the_rows_that_meet_them(
    small_tiles: None, across: bool, special: float, which: int
) -> None:
    case = options(2, is_causal=True, across=across)
    order, buckets = reference.sort_positions(case.buckets), None if across else case.buckets
    counts = reference.multiplicities(order, buckets, None, 16, 1, 0, True, True)
    clean, grad_output = inputs(), torch.randn(B, H, T, 16)
    dirty = [tensor.clone() for tensor in clean]
    dirty[which][:, :, 20] = special
    expected, actual = (run(tensors, case, grad_output, None) for tensors in (clean, dirty))
    meets = counts[:, :, :, 20] > 0
    meets[:, :, 20] = True
    torch.testing.assert_close(actual[0][~meets], expected[0][~meets])
    if which == 1:
        assert not actual[0][meets].isfinite().any(-1).all()
    # Whatever meets what meets it gets a gradient from there.
    reached = meets | (counts.transpose(2, 3).double() @ meets[..., None].double())[..., 0].bool()
    for result, clean_result in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(result[~reached], clean_result[~reached])


def test_padding_reaches_nobody_whatever_it_holds(small_tiles: None) -> None:
    case = options(key_padding_mask=(torch.arange(T, device=DEVICE) >= 30).expand(B, T), after=1)
    results = []
    for filler in (0.0, NAN, INFINITY):
        tensors = inputs()
        for tensor in tensors:
            tensor[:, :, 30:] = filler
        results.append(run(tensors, case, torch.zeros(B, H, T, 16), None)[0][:, :, :30])
        torch.manual_seed(0)
    for other in results[1:]:
        torch.testing.assert_close(other, results[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_vectors_have_finite_gradients(dtype: torch.dtype) -> None:
    """Without a direction, of equal direction, and so short that one over the length passes fp16's range."""
    query_key, value = inputs(dtype=dtype)
    query_key[:, :, ::3] = 0.0
    query_key[:, :, 1::3] = query_key[:, :, 1:2]
    query_key[:, :, 2::6] = 6e-8
    case = options()
    results = run([query_key, value], case, torch.randn_like(value), None)
    assert all(result.isfinite().all() for result in results[:2])
    assert results[2][:, :, ::3].isfinite().all() and results[3].isfinite().all()


def test_strides_and_repeated_runs(small_tiles: None) -> None:
    packed = torch.randn(2, 20, 3, 2, 24, device=DEVICE)
    tensors = [packed[:, :, 0].transpose(1, 2), packed[:, :, 2].transpose(1, 2)]
    case = options(length=20, batch=2, heads=2, is_causal=True)
    grad_output = torch.randn(2, 2, 1, 24, device=DEVICE).expand(2, 2, 20, 24)
    strided = run(tensors, case, grad_output, None)
    for other in (
        run([tensor.contiguous() for tensor in tensors], case, grad_output.contiguous(), None),
        run(tensors, case, grad_output, None),
    ):
        assert all(bits_equal(left, right) for left, right in zip(strided, other, strict=True))
    first = run([tensor[:1] for tensor in tensors], replace(case, buckets=case.buckets[:1]), grad_output[:1], None)
    assert bits_equal(first[0], strided[0][:1]) and bits_equal(first[2], strided[2][:1])


@pytest.mark.parametrize("sizes", [(0, 16, 16), (T, 0, 3), (T, 3, 0)], ids=str)
def test_empty_sizes(sizes: tuple[int, int, int]) -> None:
    length, width, value_width = sizes
    check(inputs(width, value_width, length=length), options(length=length))


@pytest.mark.parametrize("columns", [(3,), (70,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash(dtype: torch.dtype, columns: tuple[int, ...]) -> None:
    vectors = torch.randn(2, 70, 3, 40, device=DEVICE).transpose(1, 2).to(dtype)
    rotations = [torch.randn(3, 40, 2, count, device=DEVICE) for count in columns]
    padding = torch.rand(2, 70, device=DEVICE) < 0.2
    actual = functional.lsh_hash(vectors, rotations, key_padding_mask=padding, backend="triton")
    assert torch.equal(actual, reference.hash_vectors(vectors.double(), rotations, padding))


def test_hash_of_ties_and_of_nothing_is_valid() -> None:
    vectors = torch.zeros(1, 1, 5, 6, device=DEVICE)
    vectors[:, :, 2], vectors[:, :, 3], vectors[:, :, 4] = NAN, INFINITY, 1.0
    rotations = torch.randn(1, 6, 3, 5, device=DEVICE)
    rotations[..., 3] = -rotations[..., 1]
    rotations[..., 4] = rotations[..., 1]
    buckets = functional.lsh_hash(vectors, rotations, backend="triton")
    assert buckets[..., :3].eq(0).all() and buckets.ge(0).all() and buckets.lt(10).all()
    assert torch.equal(buckets[..., 4:], reference.hash_vectors(vectors[:, :, 4:], [rotations], None))


@pytest.mark.parametrize("n_buckets", [2, 33, 300, 2**31 - 1])
def test_sort_is_stable(n_buckets: int) -> None:
    buckets = torch.randint(0, n_buckets, (1, 2, 2, 75), device=DEVICE)
    buckets[:, :, 0, 10:30] = n_buckets - 1
    order = library.overload("lsh_sort", "triton")(buckets, n_buckets)
    assert torch.equal(order, reference.sort_positions(buckets))
    assert library.overload("lsh_sort", "triton")(buckets[..., :0], n_buckets).shape == (1, 2, 2, 0)


def test_the_public_function_end_to_end() -> None:
    """Hashing, sorting, attention and gradients on the one backend."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        leaves = [tensor.requires_grad_() for tensor in inputs(24, 16, length=40, heads=2)]
        output, lse = functional.lsh_attention(
            *leaves, n_hashes=3, chunk_length=16, is_causal=True, seed=4, return_lse=True, backend=backend
        )
        results.append([output, lse, *torch.autograd.grad(output.square().sum() + lse.sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    query_key, value = inputs(8, 8, length=12, dtype=torch.bfloat16)
    arguments = options(length=12, chunk_length=8).arguments()
    torch.library.opcheck(forward, (query_key, value, *arguments))
    output, statistics = forward(query_key, value, *arguments)
    torch.library.opcheck(backward, (torch.ones_like(output), None, output, statistics, query_key, value, *arguments))
