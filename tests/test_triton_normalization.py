"""Triton normalisation kernels against the float64 formula; under Triton's interpreter where there is no GPU."""

import itertools

import pytest
import torch
from torch import Tensor

from fusewright_kernels import dispatch, library, philox, row_layout, triton_support
from fusewright_kernels.normalization import backend_triton, reference, tiles

pytestmark = pytest.mark.skipif(
    triton_support.unavailable_reason() is not None, reason=str(triton_support.unavailable_reason())
)

DEVICE = "cpu" if triton_support.INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# Error budgets in units of the result's roundoff: forward, gradients.
BUDGETS = {torch.float32: (16, 24), torch.bfloat16: (2, 5), torch.float16: (2, 5)}
EPS = 1e-5

# 100 and 1000 are no powers of two; 1 has no variance; the last is longer than any whole row.
COLUMNS = (1, 3, 64, 100, 760, 1000, 1025, tiles.FORWARD_ROW_LIMIT + 77)
# 70 rows leave a part of every row tile empty.
SHORT_ROWS, LONG_ROWS = (0, 1, 5, 70), (2,)


def shapes() -> list[tuple[int, int]]:
    return [
        (rows, columns)
        for columns in COLUMNS
        for rows in (SHORT_ROWS if columns in (64, 100) else LONG_ROWS if columns > 2000 else (5,))
    ]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def root_mean_square(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def assert_close(
    actual: Tensor, oracle: Tensor, dtype: torch.dtype, *, gradient: bool, uncancelled: Tensor | None = None
) -> None:
    """RMS error within the budget, no element past 24 times that.

    Relative to the oracle's RMS or, if larger, to that of ``uncancelled``: what the result is a difference of.
    """
    assert actual.shape == oracle.shape
    assert actual.is_contiguous()
    if actual.numel() == 0:
        return
    error = actual.double() - oracle
    scale = max(root_mean_square(oracle), 0.0 if uncancelled is None else root_mean_square(uncancelled))
    budget = BUDGETS[dtype][gradient] * UNIT_ROUNDOFF[dtype]
    assert root_mean_square(error) <= budget * scale
    assert error.abs().max() <= 24 * budget * scale


def check_norm(
    input: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    normalized_ndim: int = 1,
    center: bool = True,
    weight_offset: float = 0.0,
) -> None:
    """Forward, out= and backward of one call."""
    ops = torch.ops.fusewright
    arguments = (normalized_ndim, EPS, center, weight_offset)
    output, statistics = ops.norm_forward.triton(input, weight, bias, *arguments, True)
    doubles = (double(input), double(weight), double(bias))
    expected, expected_statistics = reference.norm_with_statistics(*doubles, *arguments)
    assert output.dtype is input.dtype
    assert statistics.dtype is torch.float32
    rstd = expected_statistics[0].reshape(*input.shape[: input.ndim - normalized_ndim], *[1] * normalized_ndim)
    normalized = input.double() * rstd
    assert_close(output, expected, input.dtype, gradient=False, uncancelled=normalized)
    assert_close(statistics, expected_statistics, torch.float32, gradient=False)

    buffer = torch.empty_like(output, memory_format=torch.contiguous_format)
    ops.norm_forward_out.triton(input, weight, bias, *arguments, buffer)
    assert torch.equal(buffer, output)

    wanted = (True, weight is not None, bias is not None)
    gradients = ops.norm_backward.triton(
        grad_output, input, statistics, weight, bias, normalized_ndim, center, weight_offset, *wanted
    )
    oracle = reference.norm_backward(double(grad_output), *doubles, *arguments)
    rows = tuple(range(input.ndim - normalized_ndim))
    scaled_grad = grad_output.double() if weight is None else grad_output.double() * (weight.double() + weight_offset)
    uncancelled = (
        scaled_grad * rstd,
        (grad_output.double() * normalized).square().sum(rows).sqrt() if rows else grad_output.double() * normalized,
        grad_output.double().square().sum(rows).sqrt() if rows else grad_output.double(),
    )
    for actual, exact, scale, parameter, want in zip(
        gradients, oracle, uncancelled, (input, weight, bias), wanted, strict=True
    ):
        if want:
            assert actual.dtype is parameter.dtype
            assert_close(actual, exact, parameter.dtype, gradient=True, uncancelled=scale)


@pytest.mark.parametrize(("rows", "columns"), shapes())
@pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
def test_shapes(rows: int, columns: int, center: bool) -> None:
    parameters = random(columns), random(columns)
    check_norm(random(rows, columns), random(rows, columns), *parameters, center=center)


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    parameters = random(100, dtype=parameter_dtype), random(100, dtype=parameter_dtype)
    check_norm(random(33, 100, dtype=dtype), random(33, 100, dtype=dtype), *parameters)


@pytest.mark.parametrize(("has_weight", "has_bias"), list(itertools.product([False, True], repeat=2)))
def test_absent_parameters(has_weight: bool, has_bias: bool) -> None:
    weight, bias = random(64) if has_weight else None, random(64) if has_bias else None
    check_norm(random(9, 64), random(9, 64), weight, bias)


@pytest.mark.parametrize("columns", [64, tiles.FORWARD_ROW_LIMIT + 3])
def test_weight_offset(columns: int) -> None:
    check_norm(random(3, columns), random(3, columns), random(columns), None, center=False, weight_offset=1.0)


# (layout of a (2, 3, 4, 20) view, normalised dimensions)
LAYOUTS = {
    "transposed_columns": (lambda: random(2, 3, 20, 4).transpose(2, 3), 1),
    "transposed_rows": (lambda: random(2, 4, 3, 20).transpose(1, 2), 1),
    "permuted_rows": (lambda: random(4, 2, 3, 20).permute(1, 2, 0, 3), 1),
    "sliced": (lambda: random(2, 3, 4, 50)[..., 5:45:2], 1),
    "per_head": (lambda: random(2, 4, 3, 60).transpose(1, 2)[..., 20:40], 1),
    "expanded_rows": (lambda: random(1, 3, 1, 20).expand(2, 3, 4, 20), 1),
    "expanded_columns": (lambda: random(2, 3, 4, 1).expand(2, 3, 4, 20) + 0.0 * random(20), 1),
    "expanded_scalar": (lambda: random(1, 1, 1, 1).expand(2, 3, 4, 20), 1),
    "two_dims": (lambda: random(2, 3, 4, 20), 2),
    "two_dims_unmergeable": (lambda: random(2, 3, 20, 4).transpose(2, 3), 2),
    "all_dims": (lambda: random(2, 3, 4, 20), 4),
}


@pytest.mark.parametrize("gradient_layout", ["transposed_columns", "permuted_rows", "expanded_scalar"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, gradient_layout: str) -> None:
    make, normalized_ndim = LAYOUTS[layout]
    input, grad_output = make(), LAYOUTS[gradient_layout][0]()
    shape = input.shape[-normalized_ndim:]
    check_norm(input, grad_output, random(*shape), random(*shape), normalized_ndim=normalized_ndim)


def test_row_dimensions_beyond_three() -> None:
    """Four row dimensions of which no two merge: the documented copy."""
    input = random(2, 2, 3, 2, 10).permute(3, 0, 2, 1, 4)
    layout = row_layout.trailing_rows([input], 1)
    assert layout.row_dims == 1
    check_norm(input, random(2, 2, 3, 2, 10), random(10), None)


@pytest.mark.parametrize("layout", ["transposed_columns", "transposed_rows", "permuted_rows", "sliced", "per_head"])
def test_common_layouts_are_not_copied(layout: str) -> None:
    input = LAYOUTS[layout][0]()
    (operand,) = row_layout.trailing_rows([input], 1).operands
    assert operand is not None
    assert operand.tensor is input


def test_long_strided_rows() -> None:
    columns = tiles.BACKWARD_STRIDED_ROW_LIMIT * 2 + 5
    check_norm(random(columns, 3).T, random(columns, 3).T, random(2, columns)[:, 1:].T[:, 0].repeat(2)[:columns], None)


def test_strided_parameters() -> None:
    check_norm(random(4, 64), random(4, 64), random(64, 3)[:, 1], random(1).expand(64))


@pytest.mark.parametrize("columns", [1000, tiles.FORWARD_ROW_LIMIT + 500])
def test_large_mean(columns: int) -> None:
    """E[x^2] - E[x]^2 in float32 would lose every digit of the variance."""
    input = random(2, columns) + 1e4
    output, statistics = torch.ops.fusewright.norm_forward.triton(input, None, None, 1, EPS, True, 0.0, True)
    expected, expected_statistics = reference.norm_with_statistics(input.double(), None, None, 1, EPS, True, 0.0)
    assert (output - expected).abs().max() <= 32 * 2.0**-24 * 1e4
    assert ((statistics - expected_statistics) / expected_statistics).abs().max() <= 16 * 2.0**-24


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("columns", [100, tiles.FORWARD_ROW_LIMIT + 5])
def test_special_values_stay_in_their_row(value: float, columns: int) -> None:
    input = random(3, columns)
    clean = torch.ops.fusewright.norm_forward.triton(input, None, None, 1, EPS, True, 0.0, False)[0]
    input[1, 2] = value
    output = torch.ops.fusewright.norm_forward.triton(input, None, None, 1, EPS, True, 0.0, False)[0]
    assert output[1].isnan().all()
    assert torch.equal(output[::2], clean[::2])


def test_row_does_not_depend_on_its_batch() -> None:
    input = random(70, 100)
    together = torch.ops.fusewright.norm_forward.triton(input, None, None, 1, EPS, True, 0.0, False)[0]
    alone = torch.ops.fusewright.norm_forward.triton(input[7:8], None, None, 1, EPS, True, 0.0, False)[0]
    assert torch.equal(together[7:8], alone)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("columns", [100, tiles.BACKWARD_STRIDED_ROW_LIMIT + 3])
def test_gradients_not_asked_for_are_empty(wanted: tuple[bool, bool, bool], columns: int) -> None:
    # Columns are not adjacent, so that rows of the second length are long ones.
    input, weight, bias = random(columns, 3).T, random(columns), random(columns)
    _, statistics = torch.ops.fusewright.norm_forward.triton(input, weight, bias, 1, EPS, True, 0.0, True)
    arguments = (random(3, columns), input, statistics, weight, bias, 1, True, 0.0)
    gradients = torch.ops.fusewright.norm_backward.triton(*arguments, *wanted)
    every = torch.ops.fusewright.norm_backward.triton(*arguments, True, True, True)
    for gradient, full, want in zip(gradients, every, wanted, strict=True):
        assert torch.equal(gradient, full) if want else gradient.numel() == 0


@pytest.mark.parametrize("columns", [24, tiles.BACKWARD_ROW_LIMIT + 3])
def test_many_rows(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a program and several levels of partial sums; a run of equal gradients rounds one way."""
    monkeypatch.setattr(tiles, "_SPREAD_WARPS", 8)
    monkeypatch.setattr(tiles, "MAX_RUN", 2)
    monkeypatch.setattr(tiles, "COLUMN_SUM_GROUP", tiles.COLUMN_SUM_BLOCK_P)
    rows = 5000 if columns == 24 else 35
    check_norm(random(rows, columns), torch.full((rows, columns), 0.1, device=DEVICE), random(columns), random(columns))


def test_runs_stay_short_for_any_number_of_rows() -> None:
    for columns, rows in itertools.product((64, 768, 8192), (1, 1000, 10**6, 10**9)):
        tile = tiles.backward_tile(columns, unit_columns=True)
        assert 1 <= tiles.blocks_per_program(rows, tile) <= tiles.MAX_RUN
    assert tiles.COLUMN_SUM_GROUP // tiles.COLUMN_SUM_BLOCK_P <= tiles.MAX_RUN


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_no_elements(shape: tuple[int, int]) -> None:
    input, weight = random(*shape), random(shape[1])
    output, statistics = torch.ops.fusewright.norm_forward.triton(input, weight, None, 1, EPS, True, 0.0, True)
    assert output.shape == shape
    assert statistics.shape == (2, shape[0])
    gradients = torch.ops.fusewright.norm_backward.triton(
        input, input, statistics, weight, None, 1, True, 0.0, True, True, False
    )
    assert gradients[0].shape == shape
    assert torch.equal(gradients[1], torch.zeros_like(weight))


def check_add_norm(
    input: Tensor,
    residual: Tensor,
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    *,
    dropout_p: float = 0.0,
    center: bool = True,
    residual_dtype: torch.dtype = torch.float32,
    seed: int = 2**40 + 12345,
) -> None:
    ops = torch.ops.fusewright
    columns = input.shape[-1]
    weight, bias = random(columns), random(columns)
    seed_tensor = torch.tensor([seed], device=DEVICE) if dropout_p else None
    keep = philox.keep_mask(seed_tensor, input.numel() // columns, columns, dropout_p) if dropout_p else None
    keep = None if keep is None else keep.reshape(input.shape)
    output, new_residual, statistics = ops.add_norm_forward.triton(
        input, residual, weight, bias, seed_tensor, 1, EPS, center, 0.0, dropout_p, residual_dtype, True
    )
    parameters = (weight.double(), bias.double())
    arguments = (1, EPS, center, 0.0)
    _, exact_sum, _ = reference.add_norm_with_statistics(
        input.double(), residual.double(), *parameters, keep, *arguments, dropout_p, torch.float64
    )
    assert new_residual.dtype is residual_dtype
    assert_close(new_residual, exact_sum, residual_dtype, gradient=False)
    # The norm is that of the sum as stored, whose rounding is no error of its own.
    expected, expected_statistics = reference.norm_with_statistics(new_residual.double(), *parameters, *arguments)
    assert output.dtype is input.dtype
    assert_close(output, expected, input.dtype, gradient=False)
    assert_close(statistics, expected_statistics, torch.float32, gradient=False)

    gradients = ops.add_norm_backward.triton(
        grad_output, grad_new_residual, new_residual, statistics, weight, bias, seed_tensor,
        1, center, 0.0, dropout_p, input.dtype, residual.dtype, True, True, True, True,
    )  # fmt: skip
    oracle = reference.add_norm_backward_from_statistics(
        grad_output.double(), double(grad_new_residual), new_residual.double(), statistics.double(),
        weight.double(), bias.double(), keep, 1, center, 0.0, dropout_p, torch.float64, torch.float64,
    )  # fmt: skip
    for actual, exact, like in zip(gradients, oracle, (input, residual, weight, bias), strict=True):
        assert actual.dtype is like.dtype
        assert_close(actual, exact, like.dtype, gradient=True)


@pytest.mark.parametrize("columns", [1, 3, 100, 1025, tiles.FORWARD_ROW_LIMIT + 77])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_add_norm(columns: int, dropout_p: float, with_gradient: bool) -> None:
    tensors = [random(5 if columns < 2000 else 2, columns) for _ in range(4)]
    check_add_norm(*tensors[:3], tensors[3] if with_gradient else None, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
def test_add_norm_dtypes(dtype: torch.dtype, residual_dtype: torch.dtype | None) -> None:
    input, grad_output = random(33, 100, dtype=dtype), random(33, 100, dtype=dtype)
    stream_dtype = residual_dtype or dtype
    residual, grad_new_residual = random(33, 100, dtype=stream_dtype), random(33, 100, dtype=stream_dtype)
    check_add_norm(
        input, residual, grad_output, grad_new_residual, dropout_p=0.1, center=False, residual_dtype=stream_dtype
    )


def test_add_norm_layouts() -> None:
    check_add_norm(
        random(6, 20, 4).transpose(1, 2),
        random(4, 6, 20).transpose(0, 1),
        random(1, 1, 20).expand(6, 4, 20),
        random(6, 4, 40)[..., ::2],
        dropout_p=0.5,
    )


@pytest.mark.parametrize("columns", [64, tiles.FORWARD_ROW_LIMIT + 6])
def test_norm_is_of_the_residual_as_stored(columns: int) -> None:
    """A mean of 300 leaves bf16 two units of spread: the norm before that rounding is another one."""
    input, residual = random(4, columns, dtype=torch.bfloat16), 300 + random(4, columns, dtype=torch.bfloat16)
    output, new_residual, _ = torch.ops.fusewright.add_norm_forward.triton(
        input, residual, None, None, None, 1, EPS, True, 0.0, 0.0, torch.bfloat16, False
    )
    of_stored = reference.norm(new_residual.double(), None, None, 1, EPS, True, 0.0)
    of_sum = reference.norm(input.double() + residual.double(), None, None, 1, EPS, True, 0.0)
    assert_close(output, of_stored, torch.bfloat16, gradient=False)
    assert (of_sum - of_stored).abs().max() > 0.2


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 64, 101, tiles.FORWARD_ROW_LIMIT + 6])
@pytest.mark.parametrize("dropout_p", [2.0**-33, 0.1, 0.9, 1.0])
def test_dropout_mask_is_philox(columns: int, dropout_p: float) -> None:
    rows = 7 if columns < 2000 else 2
    seed = torch.tensor([-(2**61) - 7], device=DEVICE)
    ones, zeros = torch.ones(rows, columns, device=DEVICE), torch.zeros(rows, columns, device=DEVICE)
    _, new_residual, _ = torch.ops.fusewright.add_norm_forward.triton(
        ones, zeros, None, None, seed, 1, EPS, True, 0.0, dropout_p, torch.float32, False
    )
    assert torch.equal(new_residual != 0, philox.keep_mask(seed, rows, columns, dropout_p))


def test_repeated_backward_has_the_same_bits() -> None:
    input, grad_output, weight = random(700, 100), random(700, 100), random(100)
    _, statistics = torch.ops.fusewright.norm_forward.triton(input, weight, weight, 1, EPS, True, 0.0, True)
    arguments = (grad_output, input, statistics, weight, weight, 1, True, 0.0, True, True, True)
    for first, second in zip(
        torch.ops.fusewright.norm_backward.triton(*arguments),
        torch.ops.fusewright.norm_backward.triton(*arguments),
        strict=True,
    ):
        assert torch.equal(first, second)


def test_fakes_agree() -> None:
    input, weight, seed = random(4, 3, 8, dtype=torch.bfloat16), random(8), torch.tensor([3], device=DEVICE)
    arguments = (input, input, weight, None, seed, 1, EPS, True, 0.0, 0.5, torch.float32, True)
    torch.library.opcheck(library.overload("add_norm_forward", "triton"), arguments)
    statistics = torch.ops.fusewright.add_norm_forward.triton(*arguments)[2]
    torch.library.opcheck(
        library.overload("norm_backward", "triton"),
        (input, input, statistics, weight, None, 1, True, 0.0, True, True, False),
    )


def test_refusals_name_the_cause() -> None:
    served = dispatch.Call("norm", DEVICE, (torch.bfloat16, torch.float32), 3)
    assert backend_triton.refuse(served) is None
    assert "float64" in str(backend_triton.refuse(served._replace(dtypes=(torch.float64,))))
    assert "xpu" in str(backend_triton.refuse(served._replace(device_type="xpu")))
