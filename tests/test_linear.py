"""The linear layer for few rows against the float64 oracle, and when it gives way to torch's."""

import pytest
import torch
from op_support import dtypes
from torch.library import opcheck

from fusewright import functional, nn, testing
from fusewright.testing import layouts
from fusewright_kernels import dispatch, library, native
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError
from fusewright_kernels.linear.op import LEAST_WEIGHTS, MOST_ROWS

needs_kernels = pytest.mark.skipif(
    native.cpu_unavailable_reason() is not None, reason=str(native.cpu_unavailable_reason())
)


def _normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _assert_accurate(output, input, weight, bias):
    wide = [tensor if tensor is None else tensor.double() for tensor in (input, weight, bias)]
    oracle = torch.nn.functional.linear(*wide)
    magnitude = torch.nn.functional.linear(wide[0].square(), wide[1].square()).sqrt()
    testing.assert_accurate(
        output, oracle, magnitude=testing.rms(magnitude) if magnitude.numel() else 0.0,
        budget=testing.budget_of(input.dtype),
    )  # fmt: skip


@needs_kernels
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 13, 33])
def test_rows_and_odd_sizes(rows, dtype):
    for columns, width in ((1, 1), (5, 31), (16, 32), (17, 33), (50, 770), (3, 4099)):
        for bias in (None, _normal(columns, dtype=dtype, seed=2)):
            input, weight = _normal(rows, width, dtype=dtype), _normal(columns, width, dtype=dtype, seed=1)
            _assert_accurate(functional.linear(input, weight, bias, backend="cpu"), input, weight, bias)


@needs_kernels
@dtypes
def test_every_instruction_set_of_this_machine(dtype):
    input, weight, bias = (_normal(*size, dtype=dtype, seed=len(size)) for size in ((7, 259), (37, 259), (37,)))
    before = native.cpu_isa()
    try:
        for isa in native.cpu_isas():
            native.select_cpu_isa(isa)
            _assert_accurate(functional.linear(input, weight, bias, backend="cpu"), input, weight, bias)
    finally:
        native.select_cpu_isa(before)


@needs_kernels
@dtypes
def test_layouts_and_guards(dtype):
    input, weight, bias = _normal(2, 3, 70, dtype=dtype), _normal(41, 70, dtype=dtype, seed=1), _normal(41, dtype=dtype)
    expected = functional.linear(input, weight, bias, backend="cpu")
    for name, varied in layouts.layout_variants(input):
        for other, placed in layouts.layout_variants(weight):
            if name == "expanded" or other == "expanded":
                continue  # its values are others
            guards = [testing.guarded(tensor) for tensor in (varied, placed, bias)]
            with testing.guarded_allocations():
                result = functional.linear(*(guard.tensor for guard in guards), backend="cpu")
            assert torch.equal(result, expected), (name, other)
            for guard in guards:
                guard.check()


@needs_kernels
@dtypes
def test_a_row_is_the_same_in_any_company(dtype):
    input, weight = _normal(MOST_ROWS, 300, dtype=dtype), _normal(150, 300, dtype=dtype, seed=1)
    together = functional.linear(input, weight)
    for rows in range(1, MOST_ROWS):
        assert torch.equal(functional.linear(input[:rows], weight), together[:rows])


@needs_kernels
def test_nothing_to_do():
    for input, weight in (
        (_normal(0, 5), _normal(3, 5)),
        (_normal(2, 5), _normal(0, 5)),
        (_normal(2, 0), _normal(3, 0)),
    ):
        result = functional.linear(input, weight, torch.ones(weight.shape[0]), backend="cpu")
        torch.testing.assert_close(result, torch.ones(input.shape[0], weight.shape[0]))
    assert functional.linear(_normal(5), _normal(3, 5), backend="cpu").shape == (3,)


@needs_kernels
def test_nan_stays_in_its_row():
    input = _normal(3, 40)
    input[1, 7] = torch.nan
    assert functional.linear(input, _normal(20, 40), backend="cpu").isnan().any(1).tolist() == [False, True, False]


def _served(*arguments):
    """Whether a call takes the kernel for few rows."""
    with dispatch.recording() as decisions:
        functional.linear(*arguments)
    return any(decision.backend == "cpu" for decision in decisions)


@needs_kernels
def test_when_torch_serves():
    width = 2 * int(LEAST_WEIGHTS**0.5)
    weight = _normal(width, width)
    assert _served(_normal(MOST_ROWS, width), weight)
    assert _served(_normal(2, 2, width), weight, _normal(width))
    assert not _served(_normal(MOST_ROWS + 1, width), weight)
    assert not _served(_normal(1, 8), _normal(8, 8))
    assert not _served(_normal(1, width).double(), weight.double())
    assert not _served(_normal(1, width), weight.clone().requires_grad_())
    with torch.no_grad():
        assert _served(_normal(1, width), weight.clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not _served(_normal(1, width), weight)
    assert torch.vmap(lambda row: functional.linear(row, weight))(_normal(3, width)).shape == (3, width)


def test_it_compiles_and_differentiates():
    module = nn.Linear(200, 100)
    input = _normal(2, 200)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(input), module(input))
    module(input).sum().backward()
    assert module.weight.grad.shape == (100, 200)


@needs_kernels
def test_opcheck():
    op = library.overload("few_rows_linear", "cpu")
    opcheck(op, (_normal(2, 3, 40), _normal(20, 40), _normal(20)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), ArgumentValueError, "weight.shape is (4, 5)"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(5)), ArgumentValueError, "bias.shape is (5,)"),
        ((torch.ones(2, 3), torch.ones(3)), ArgumentValueError, "weight.shape is (3,)"),
        ((torch.ones(()), torch.ones(4, 3)), ArgumentValueError, "input.ndim is 0"),
        ((torch.ones(2, 3), torch.ones(4, 3).bfloat16()), ArgumentTypeError, "weight.dtype is torch.bfloat16"),
        ((torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)), ArgumentValueError, "backend is 'cpu'"),
    ],
)
@needs_kernels
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        functional.linear(*arguments, backend="cpu")


def test_torch_says_what_is_wrong_where_no_backend_is_named():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        functional.linear(torch.ones(2, 3), torch.ones(4, 5))
