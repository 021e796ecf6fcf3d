"""Triton softmax kernels against the float64 formula; under Triton's interpreter where there is no GPU."""

import math

import pytest
import torch
from torch import Tensor

from fusewright_kernels import library, triton_support
from fusewright_kernels.softmax import backend_triton, reference, tiles

pytestmark = pytest.mark.skipif(
    triton_support.unavailable_reason() is not None, reason=str(triton_support.unavailable_reason())
)

DEVICE = "cpu" if triton_support.INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# Error budgets in units of the result's roundoff: forward, gradients.
BUDGETS = {torch.float32: (16, 24), torch.bfloat16: (2, 5), torch.float16: (2, 5)}
LONG_ROW = tiles.ROW_LIMIT + 77


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def root_mean_square(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def assert_close(actual: Tensor, oracle: Tensor, *, gradient: bool, uncancelled: Tensor | None = None) -> None:
    """RMS error within the budget, no element past 24 times that.

    Relative to the oracle's RMS or, if larger, to that of ``uncancelled``: what the result is a difference of.
    """
    assert actual.shape == oracle.shape
    assert actual.is_contiguous()
    if actual.numel() == 0:
        return
    error = actual.double() - oracle
    scale = max(root_mean_square(oracle), 0.0 if uncancelled is None else root_mean_square(uncancelled))
    # fp16 gradients of long rows lie below its smallest normal number, where the spacing is absolute.
    spacing = 2.0**-24 if actual.dtype is torch.float16 else 1e-30
    budget = BUDGETS[actual.dtype][gradient] * UNIT_ROUNDOFF[actual.dtype] * scale + spacing
    assert root_mean_square(error) <= budget
    assert error.abs().max() <= 24 * budget


def check(input: Tensor, grad_output: Tensor, dim: int, output_dtype: torch.dtype | None = None) -> None:
    ops = torch.ops.fusewright
    output_dtype = output_dtype or input.dtype
    output = ops.softmax_forward.triton(input, dim, output_dtype)
    assert output.dtype is output_dtype
    assert_close(output, reference.softmax(input.double(), dim, torch.float64), gradient=False)

    buffer = torch.empty_like(output)
    ops.softmax_forward_out.triton(input, dim, buffer)
    assert torch.equal(buffer, output)

    grad_input = ops.softmax_backward.triton(grad_output, output, dim, input.dtype)
    assert grad_input.dtype is input.dtype
    oracle = reference.softmax_backward(grad_output.double(), output.double(), dim, torch.float64)
    assert_close(grad_input, oracle, gradient=True, uncancelled=output.double() * grad_output.double())


@pytest.mark.parametrize("columns", [1, 3, 64, 100, 760, 1000, 1025])
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_shapes(rows: int, columns: int) -> None:
    check(random(rows, columns), random(rows, columns), 1)


@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, output_dtype: torch.dtype) -> None:
    check(random(33, 100, dtype=dtype), random(33, 100, dtype=output_dtype), 1, output_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(dtype: torch.dtype) -> None:
    check(random(2, LONG_ROW, dtype=dtype), random(2, LONG_ROW, dtype=dtype), 1)


@pytest.mark.parametrize("columns", [tiles.STRIDED_ROW_LIMIT // 8, tiles.STRIDED_ROW_LIMIT + 5])
def test_rows_of_strided_columns(columns: int) -> None:
    check(random(columns, 2).T, random(2, 2 * columns)[:, ::2], 1)


@pytest.mark.parametrize("columns", [1, 7, tiles.ACROSS_ROW_LIMIT, tiles.ACROSS_ROW_LIMIT + 70])
@pytest.mark.parametrize("dim", [0, 1])
def test_other_dimensions(dim: int, columns: int) -> None:
    shape = [columns, 3, 40] if dim == 0 else [2, columns, 40]
    check(random(*shape), random(*shape), dim)


LAYOUTS = {
    "transposed": lambda: random(2, 3, 20, 4).transpose(2, 3),
    "transposed_rows": lambda: random(2, 4, 3, 20).transpose(1, 2),
    "permuted": lambda: random(20, 2, 4, 3).permute(1, 3, 2, 0),
    "sliced": lambda: random(2, 3, 4, 50)[..., 5:45:2],
    "expanded_rows": lambda: random(1, 3, 1, 20).expand(2, 3, 4, 20),
    "expanded_columns": lambda: random(2, 3, 4, 1).expand(2, 3, 4, 20),
    "expanded_scalar": lambda: random(1, 1, 1, 1).expand(2, 3, 4, 20),
}


@pytest.mark.parametrize("dim", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dim: int) -> None:
    input = LAYOUTS[layout]()
    check(input, LAYOUTS["transposed"](), dim)
    check(LAYOUTS["permuted"](), input, dim)


def test_row_dimensions_beyond_three() -> None:
    input = random(2, 2, 3, 2, 2, 5).permute(4, 3, 0, 5, 2, 1)
    check(input, torch.randn_like(input), 3)


@pytest.mark.parametrize("columns", [100, LONG_ROW])
@pytest.mark.parametrize("dim", [0, 1])
def test_special_values_as_torch(dim: int, columns: int) -> None:
    """Rows of -inf alone are NaN, an -inf first tile is not; +inf and NaN spoil their row only."""
    if dim == 0 and columns == LONG_ROW:
        columns = 3 * tiles.ACROSS_ROW_LIMIT
    input = random(7, columns)
    input[1] = -math.inf
    input[2, : columns - 1] = -math.inf
    input[3, columns // 2] = math.inf
    input[4, columns - 1] = math.nan
    input[5] = 1e30
    input[6, 0] = -math.inf
    if dim == 0:
        input = input.T.contiguous()
    output = torch.ops.fusewright.softmax_forward.triton(input, dim, torch.float32)
    torch.testing.assert_close(output, torch.softmax(input, dim), equal_nan=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [100, LONG_ROW])
def test_large_logits(columns: int) -> None:
    input = 80 * random(3, columns) + 1e4
    output = torch.ops.fusewright.softmax_forward.triton(input, 1, torch.float32)
    budget = 16 * 2.0**-24 * (input - input.amax(1, keepdim=True)).abs().max() / 16
    assert (output - reference.softmax(input.double(), 1, torch.float64)).abs().max() <= budget


def test_row_does_not_depend_on_its_batch() -> None:
    input = random(70, 100)
    together = torch.ops.fusewright.softmax_forward.triton(input, 1, torch.float32)
    alone = torch.ops.fusewright.softmax_forward.triton(input[7:8], 1, torch.float32)
    assert torch.equal(together[7:8], alone)
    across = torch.ops.fusewright.softmax_forward.triton(input.T[:, 7:8].contiguous(), 0, torch.float32)
    assert torch.equal(torch.ops.fusewright.softmax_forward.triton(input.T, 0, torch.float32)[:, 7:8], across)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (3, 0, 2)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    input = random(*shape)
    for dim in range(len(shape)):
        output = torch.ops.fusewright.softmax_forward.triton(input, dim, torch.float32)
        assert output.shape == shape
        assert torch.ops.fusewright.softmax_backward.triton(output, output, dim, torch.float32).shape == shape


def test_fakes_agree() -> None:
    input = random(4, 3, 8, dtype=torch.bfloat16)
    torch.library.opcheck(library.overload("softmax_forward", "triton"), (input, 1, torch.float32))
    torch.library.opcheck(library.overload("softmax_backward", "triton"), (input, input, 1, torch.float32))


def test_the_launchers_are_registered() -> None:
    for launcher in (backend_triton.softmax_forward, backend_triton.softmax_backward):
        key = "CPU" if triton_support.INTERPRETED else "CUDA"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusewright::{launcher.__name__}.triton", key)
