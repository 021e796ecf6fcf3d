"""Triton kernels of linear attention against the formula in float64; under Triton's interpreter without a GPU."""

import pytest
import torch
from test_linear_attention import compare, inputs
from torch import Tensor
from triton_interpreter import patch_language_once_per_launch

from fusewright import functional
from fusewright.testing import bits_equal
from fusewright_kernels import dispatch, library, triton_support
from fusewright_kernels.linear_attention import reference, tiles

pytestmark = pytest.mark.skipif(
    not triton_support.INTERPRETED, reason="the formula's inputs are on the CPU, where only the interpreter runs"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INFINITY = float("nan"), float("inf")
CAUSAL = pytest.mark.parametrize("causal", [False, True])


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_language_once_per_launch(monkeypatch)


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short sequences have several in a block and several blocks, and wide rows several pieces."""
    if "shipped" not in request.node.name:
        monkeypatch.setattr(tiles, "tile", lambda itemsize, d, dv, causal: tiles.Tile(16, 16, 16, 4, 32))


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (2, 1, 33, 33, 7, 5), (1, 1, 50, 50, 20, 40)], ids=str)
def test_sizes(sizes: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    compare(inputs(*sizes, dtype=dtype), "triton", is_causal=causal, with_state=True)


@pytest.mark.parametrize("causal, dtype", [(False, DTYPES[0]), (True, DTYPES[0]), (True, DTYPES[1])], ids=str)
def test_shipped_tiles(dtype: torch.dtype, causal: bool) -> None:
    compare(inputs(1, 1, 70, 70, 40, 33, dtype=dtype), "triton", is_causal=causal, with_state=True)


@pytest.mark.parametrize("lengths", [(5, 50), (50, 5), (20, 1)], ids=str)
def test_queries_and_keys_of_different_number(lengths: tuple[int, int]) -> None:
    compare(inputs(1, 2, *lengths, 12, 9), "triton", with_state=True)


@CAUSAL
def test_padding_and_features(causal: bool) -> None:
    padding = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)) < 0.4
    padding[1] = True
    compare(inputs(2, 1, 50, 50, 12, 9), "triton", is_causal=causal, key_padding_mask=padding)
    operands = inputs(1, 1, 50, 50, 12, 9)
    operands[0], operands[1] = operands[0].exp(), operands[1].exp()
    compare(operands, "triton", is_causal=causal, feature_map="identity", eps=0.0)


def test_large_features_of_fp16() -> None:
    """Sums of features pass its range."""
    operands = inputs(1, 1, 50, 50, 12, 9, dtype=torch.float16)
    operands[0], operands[1] = operands[0] * 1e3, operands[1] * 1e4
    for causal in (False, True):
        output = functional.linear_attention(*operands[:3], causal, backend="triton")
        expected = functional.linear_attention(*(tensor.double() for tensor in operands[:3]), causal)
        torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3)


def both(operands: list[Tensor], **options: object) -> list[list[Tensor]]:
    """Output and gradients of the kernels and of the plain formula in float64."""
    results = []
    for backend, kind in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in operands]
        output = functional.linear_attention(*leaves, backend=backend, **options)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    return results


@CAUSAL
@pytest.mark.parametrize("special", [NAN, INFINITY])
def test_padding_leaves_no_trace(special: float, causal: bool) -> None:
    clean = inputs(1, 1, 50, 50, 8, 8)[:3]
    other = [clean[0], *(tensor.clone() for tensor in clean[1:])]
    padding = torch.zeros(1, 50, dtype=torch.bool)
    padding[:, 20:30] = True
    for tensor in other[1:]:
        tensor[:, :, 20:30] = special
    results = [both(tensors, is_causal=causal, key_padding_mask=padding)[0] for tensors in (clean, other)]
    assert all(bits_equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("special", [NAN, INFINITY])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_special_values_stay_behind_themselves(name: str, special: float) -> None:
    """A causal row is met by later ones alone, and its gradient by earlier ones."""
    clean = inputs(1, 1, 50, 50, 4, 4)[:3]
    dirty = [tensor.clone() for tensor in clean]
    dirty[("query", "key", "value").index(name)][:, :, 20] = special
    expected, actual = (both(tensors, is_causal=True)[0] for tensors in (clean, dirty))
    if name == "query":
        others = torch.arange(50) != 20
        assert bits_equal(actual[0][:, :, others], expected[0][:, :, others])
        assert bits_equal(actual[1][:, :, others], expected[1][:, :, others])
        for gradient, other in zip(actual[2:], expected[2:], strict=True):
            assert bits_equal(gradient[:, :, 21:], other[:, :, 21:])
    else:
        for result, other in zip(actual[:2], expected[:2], strict=True):
            assert bits_equal(result[:, :, :20], other[:, :, :20])
        assert not actual[0][:, :, 20:].isfinite().any()


@pytest.mark.parametrize(
    "sizes",
    [(0, 1, 3, 3, 4, 2), (1, 0, 3, 3, 4, 2), (1, 1, 0, 0, 4, 2), (1, 1, 3, 0, 4, 2), (1, 1, 3, 3, 4, 0),
     (1, 1, 3, 3, 0, 2)],
    ids=str,
)  # fmt: skip
def test_empty_sizes(sizes: tuple[int, ...]) -> None:
    for causal in (False, True):
        if causal and sizes[2] != sizes[3]:
            continue
        for actual, expected in zip(*both(inputs(*sizes)[:3], is_causal=causal), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_strides_and_repeated_runs() -> None:
    operands = inputs(2, 2, 20, 20, 8, 8)[:3]
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in operands]
    results = [both(tensors, is_causal=True)[0] for tensors in (operands, strided, strided)]
    for other in results[1:]:
        assert all(bits_equal(left, right) for left, right in zip(results[0], other, strict=True))
    first = both([tensor[:1] for tensor in operands], is_causal=True)[0]
    assert all(bits_equal(left, right[:1]) for left, right in zip(first, results[0], strict=True))


def test_who_serves_what() -> None:
    call = dispatch.Call("linear_attention", "cuda", (torch.float64,), 4)
    refusals = {refusal.backend: refusal.reason for refusal in dispatch.decide(call).refusals}
    assert "float64" in refusals["triton"]
    assert dispatch.predicates("linear_attention")["triton"](call._replace(dtypes=(torch.float16,))) is None


def test_opcheck() -> None:
    query, key, value, state = inputs(1, 2, 20, 20, 8, 4)
    forward, backward = (library.overload(f"linear_attention_{name}", "triton") for name in ("forward", "backward"))
    for extras in (
        (None, None, False, 1e-6, reference.ELU),
        (torch.rand(1, 20) < 0.3, state, True, 0.0, reference.IDENTITY),
    ):
        arguments = (query, key, value, *extras)
        torch.library.opcheck(forward, arguments)
        output, normalizer, final = forward(*arguments)
        wanted = (True, True, True, True) if extras[1] is not None else (False, True, False, False)
        given = (torch.randn_like(output), torch.randn_like(final), output, normalizer, *arguments, *wanted)
        torch.library.opcheck(backward, given)
