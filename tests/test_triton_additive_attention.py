"""Triton kernels of additive attention against the formula written out; under Triton's interpreter without a GPU."""

import pytest
import torch
from test_additive_attention import compare, inputs
from torch import Tensor
from triton_interpreter import patch_language_once_per_launch

from fusewright import functional
from fusewright.testing import bits_equal
from fusewright_kernels import dispatch, library, triton_support
from fusewright_kernels.attention import tiles
from fusewright_kernels.matrix_tiles import Tile

pytestmark = pytest.mark.skipif(
    not triton_support.INTERPRETED, reason="the formula's inputs are on the CPU, where only the interpreter runs"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")
SIZES = (1, 2, 1, 19, 22, 6, 5)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_language_once_per_launch(monkeypatch)


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short sequences have several, and wide rows several pieces."""
    if "shipped" not in request.node.name:
        monkeypatch.setattr(tiles, "additive_tile", lambda d, dv: Tile(16, 16, 16, 16, 4, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1), (2, 2, 2, 17, 5, 3, 4), SIZES], ids=str)
def test_sizes(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(inputs(*sizes, dtype=dtype), "triton")


def test_pieces_of_wide_rows() -> None:
    compare(inputs(1, 1, 1, 5, 18, 21, 37), "triton")


def test_shipped_tiles() -> None:
    compare(inputs(1, 2, 1, 5, 37, 4, 150, dtype=torch.bfloat16), "triton", is_causal=True)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": 4}, {"scale": -2.0}], ids=str)
def test_options(options: dict[str, object]) -> None:
    compare(inputs(*SIZES), "triton", **options)


@pytest.mark.parametrize("shape", [(1, 2, 19, 22), (1, 1, 1, 22), (1, 2, 19, 1)], ids=str)
def test_masks(shape: tuple[int, ...]) -> None:
    compare(inputs(*SIZES), "triton", torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5)


@pytest.mark.parametrize("size", [1e-4, 30.0, 300.0])
def test_small_and_large_terms(size: float) -> None:
    compare(inputs(*SIZES, size=size), "triton")


def both(operands: list[Tensor], **options: object) -> list[list[Tensor]]:
    """Output and gradients of the kernels and of the plain formula in float64."""
    results = []
    for backend, kind in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in operands]
        output = functional.additive_attention(*leaves, enable_gqa=True, backend=backend, **options)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    return results


def test_dropout_is_redrawn_from_its_seed() -> None:
    for actual, expected in zip(*both(inputs(*SIZES), dropout_p=0.4, seed=3), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_reaches_only_what_sees_it(name: str) -> None:
    operands = inputs(1, 1, 1, 20, 20, 4, 4)
    operands[("query", "key", "value").index(name)][:, :, 12] = NAN
    for actual, expected in zip(*both(operands, is_causal=True), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        torch.testing.assert_close(actual.nan_to_num().double(), expected.nan_to_num(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [(0, 1, 1, 3, 4, 2, 2), (1, 1, 1, 0, 4, 2, 2), (1, 1, 1, 3, 0, 2, 2), (1, 1, 1, 3, 4, 0, 2), (1, 1, 1, 3, 4, 2, 0)],
)  # fmt: skip
def test_empty_sizes(sizes: tuple[int, ...]) -> None:
    for actual, expected in zip(*both(inputs(*sizes)), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_strides_and_repeated_runs() -> None:
    operands = inputs(2, 2, 2, 18, 18, 6, 6)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in operands[:3]]
    strided.append(operands[3].T.contiguous().T)
    results = [both(tensors, is_causal=True)[0] for tensors in (operands, strided, strided)]
    for other in results[1:]:
        assert all(bits_equal(left, right) for left, right in zip(results[0], other, strict=True))


def test_additive_masks_are_left_to_others() -> None:
    call = dispatch.Call("additive_attention", "cpu", (torch.float32, torch.float32), 4)
    refusals = {refusal.backend: refusal.reason for refusal in dispatch.decide(call).refusals}
    assert "boolean masks only" in refusals["triton"]


def test_opcheck() -> None:
    query, key, value, weight = inputs(1, 2, 1, 5, 7, 3, 4)
    arguments = (query, key, value, weight, None, None, 1.0, 0.0, -1, 0, False)
    torch.library.opcheck(library.overload("additive_attention_forward", "triton"), arguments)
    output, statistics = library.overload("additive_attention_forward", "triton")(*arguments)
    backward = (torch.ones_like(output), None, output, statistics, *arguments, True, True, True, True, False)
    torch.library.opcheck(library.overload("additive_attention_backward", "triton"), backward)
