"""Rotary embedding, SwiGLU, GELU with a bias and dropout with a residual, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from op_support import Target, dtypes, kernel_targets, targets, with_gradients
from torch.func import grad, vmap

from fusewright import functional, testing
from fusewright_kernels import library, native, philox
from fusewright_kernels.activation.function import BiasGELU, SwiGLU
from fusewright_kernels.checks import ArgumentIndexError, ArgumentTypeError, ArgumentValueError
from fusewright_kernels.dropout_add.function import DropoutAdd
from fusewright_kernels.rotary.function import Rotary
from fusewright_kernels.rotary.reference import rotate

OPS = ("rotary_embedding", "swiglu", "bias_gelu", "dropout_add")


def _failures(target, dtype, step=1):
    chosen = [case for case in testing.cases(OPS) if case.dtype is dtype]
    if target is not None and target.interpreted:
        chosen = [case for case in chosen if case.rows * case.columns < 20000]
    backend, device = ("cpu", "cpu") if target is None else (target.backend, target.device)
    failures = []
    for case in chosen[::step]:
        judgements = testing.evaluate(case, backend, device, interpreted=target is not None and target.interpreted)
        failures += [f"{case.id} {name}: {item.failures}" for name, item in judgements.items() if not item.passed]
    return failures


def _tables(positions, pairs, target, batch=None):
    sizes = (positions, pairs) if batch is None else (batch, positions, pairs)
    angles = 7.0 * target.tensor(*sizes, seed=3)
    return angles.cos(), angles.sin()


@dtypes
@targets
def test_every_public_case_is_within_its_budget(target, dtype):
    assert _failures(target, dtype) == []


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason=str(native.cpu_unavailable_reason()))
@dtypes
def test_every_instruction_set_of_this_machine_is_within_budget(dtype):
    before, failures = native.cpu_isa(), {}
    try:
        for isa in native.cpu_isas():
            native.select_cpu_isa(isa)
            failures[isa] = _failures(None, dtype)
    finally:
        native.select_cpu_isa(before)
    assert failures == {isa: [] for isa in native.cpu_isas()}


LAYOUTS = {
    "contiguous": lambda make: make(2, 3, 5, 22),
    "length_first": lambda make: make(2, 5, 3, 22).transpose(1, 2),
    "packed": lambda make: make(2, 5, 9, 22)[:, :, 3:6].transpose(1, 2),
    "strided": lambda make: make(2, 3, 5, 44)[..., ::2],
    "expanded": lambda make: make(2, 1, 5, 22).expand(2, 3, 5, 22),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 9, 11])
@pytest.mark.parametrize("layout", LAYOUTS)
@targets
def test_rotary_of_any_layout_and_position(target, layout, pairs, interleaved):
    input = LAYOUTS[layout](target.tensor)
    cos, sin = _tables(8, pairs, target)
    positions = torch.tensor([[7, 0, 0, 3, 2], [1, 2, 3, 4, 5]], device=target.device)
    of_sequences = _tables(6, pairs, target, batch=2)
    for tables, rows in (
        ((cos, sin), None),
        ((cos, sin), positions),
        ((cos, sin), positions[1]),
        (of_sequences, None),
        (of_sequences, positions.clamp_max(5)),
    ):
        ours = with_gradients(
            lambda x, tables=tables, rows=rows: functional.rotary_embedding(
                x, *tables, rows, interleaved=interleaved, backend=target.backend
            ),
            [input],
        )
        wide = [table.double() if table.ndim == 3 else table.double()[None] for table in tables]
        where = None if rows is None else rows.expand(2, 5)
        oracle = with_gradients(lambda x, w=wide, r=where: rotate(x, *w, r, interleaved), [input.double()])
        for actual, expected in zip(ours, oracle, strict=True):
            testing.assert_accurate(actual.cpu(), expected.cpu())
    if target.backend != "reference" and layout in ("length_first", "packed"):
        assert ours[0].stride(1) < ours[0].stride(2)
    changed = input.clone() if layout == "expanded" else LAYOUTS[layout](lambda *s: target.tensor(*s).clone())
    before = changed.clone()
    result = functional.rotary_embedding(
        changed, cos, sin, interleaved=interleaved, in_place=True, backend=target.backend
    )
    assert result is changed
    torch.testing.assert_close(
        changed, functional.rotary_embedding(before, cos, sin, interleaved=interleaved, backend="reference")
    )


@targets
def test_a_position_that_no_table_has(target):
    cos, sin = _tables(4, 2, target)
    if target.device == "cpu":
        with pytest.raises(ArgumentIndexError, match="positions holds 4"):
            functional.rotary_embedding(target.tensor(1, 1, 1, 4), cos, sin, torch.tensor([4]), backend=target.backend)
    if target.backend != "reference":
        rotary = library.overload("rotary_forward", target.backend)
        wrong = torch.tensor([[4, 0, -1]], device=target.device)
        output = rotary(target.tensor(1, 1, 3, 5), cos[None], sin[None], wrong, False, False)
        assert output.isnan()[0, 0].tolist() == [[True] * 4 + [False], [False] * 5, [True] * 4 + [False]]


@pytest.mark.parametrize("shape", [(0, 8), (5, 6), (2, 3, 34), (1, 2, 2, 3, 6)], ids=str)
@targets
def test_packed_swiglu_is_that_of_its_halves(target, shape):
    packed = target.tensor(*shape)
    gate, up = packed.chunk(2, dim=-1)
    output, gradient = with_gradients(lambda x: functional.swiglu(x, backend=target.backend), [packed])
    expected, grad_gate, grad_up = with_gradients(lambda g, u: F.silu(g) * u, [gate, up])
    torch.testing.assert_close(output, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, torch.cat([grad_gate, grad_up], dim=-1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@targets
def test_gelu_at_the_ends_of_the_axis(target, approximate):
    input = torch.tensor([-1e4, -20.0, -6.0, -1e-30, 0.0, 1e-30, 6.0, 20.0, 1e4, math.nan], device=target.device)
    ours = with_gradients(lambda x: functional.bias_gelu(x, None, approximate, backend=target.backend), [input])
    theirs = with_gradients(lambda x: F.gelu(x, approximate=approximate), [input])
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@targets
def test_dropout_draws_the_same_mask_everywhere(target, dropout_p):
    input, residual = target.tensor(7, 70), target.tensor(7, 70, seed=1)
    output, grad_input, grad_residual = with_gradients(
        lambda x, r: functional.dropout_add(x, r, dropout_p, seed=11, backend=target.backend), [input, residual]
    )
    keep = philox.keep_mask(torch.tensor([11], device=target.device), 7, 70, dropout_p)
    scale = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
    torch.testing.assert_close(output, torch.where(keep, input * scale, 0.0) + residual, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_input, torch.where(keep, grad_residual * scale, 0.0), rtol=1e-6, atol=1e-6)
    torch.manual_seed(3)
    first, second = (functional.dropout_add(input, residual, 0.5, backend=target.backend) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, functional.dropout_add(input, residual, 0.5, backend=target.backend))
    assert not torch.equal(first, second)


def _calls(target):
    """Every op as a function of one (4, 6) tensor."""
    cos, sin = _tables(4, 2, target)
    other, bias = target.tensor(4, 6, seed=1), target.tensor(6, seed=2)
    backend = target.backend
    return {
        "rotary": lambda x: functional.rotary_embedding(x[None, None], cos, sin, backend=backend)[0, 0],
        "interleaved": lambda x: functional.rotary_embedding(
            x[None, None], cos, sin, torch.tensor([3, 0, 1, 1], device=x.device), interleaved=True, backend=backend
        )[0, 0],
        "swiglu": lambda x: functional.swiglu(x, other, backend=backend),
        "packed": lambda x: functional.swiglu(x, backend=backend),
        "gelu": lambda x: functional.bias_gelu(x, bias, backend=backend),
        "gelu_tanh": lambda x: functional.bias_gelu(x, bias, "tanh", backend=backend),
        "dropout": lambda x: functional.dropout_add(x, other, 0.4, seed=5, backend=backend),
    }


CALLS = tuple(_calls(Target("reference", "cpu")))


@pytest.mark.parametrize("call", CALLS)
@kernel_targets
def test_functorch_double_backward_and_compile(target, call):
    ours, plain = _calls(target)[call], _calls(Target("reference", target.device))[call]
    batched = target.tensor(3, 4, 6)

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    close(vmap(ours)(batched), vmap(plain)(batched))
    close(vmap(ours, 1)(batched.movedim(0, 1)), vmap(plain)(batched))

    def loss(function):
        return lambda x: function(x).square().sum()

    close(vmap(grad(loss(ours)))(batched), vmap(grad(loss(plain)))(batched))

    def second(function):
        leaf = batched[0].detach().requires_grad_()
        (first,) = torch.autograd.grad(loss(function)(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    close(second(ours), second(plain))
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=call == "packed", backend="aot_eager")
    for actual, expected in zip(
        with_gradients(compiled, [batched[1]]), with_gradients(ours, [batched[1]]), strict=True
    ):
        close(actual, expected)


def test_first_and_second_derivatives_in_float64():
    target = Target("reference", "cpu")
    a, b = (target.tensor(3, 6, dtype=torch.float64, seed=i, requires_grad=True) for i in (0, 1))
    bias = target.tensor(6, dtype=torch.float64, seed=2, requires_grad=True)
    cos, sin = (table.double()[None] for table in _tables(3, 2, target))
    seed = torch.tensor([4])
    for function, inputs in (
        (lambda g, u: SwiGLU.apply(g, u, "reference"), (a, b)),
        (lambda g: SwiGLU.apply(g, None, "reference"), (a,)),
        (lambda x, c: BiasGELU.apply(x, c, False, "reference"), (a, bias)),
        (lambda x, c: BiasGELU.apply(x, c, True, "reference"), (a, bias)),
        (lambda x, r: DropoutAdd.apply(x, r, seed, 0.3, "reference"), (a, b)),
        (lambda x: Rotary.apply(x[None, None], cos, sin, None, True, False, "reference"), (a,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@targets
def test_opcheck(target):
    def check(name, *arguments):
        torch.library.opcheck(library.overload(name, target.backend), arguments)

    x, bias = target.tensor(3, 4, 6), target.tensor(6)
    cos, sin = (table[None] for table in _tables(5, 2, target))
    positions = torch.tensor([[0, 4, 2, 1]], device=target.device).expand(3, 4)
    for heads in (target.tensor(3, 2, 4, 6), target.tensor(3, 4, 2, 6).transpose(1, 2)):
        check("rotary_forward", heads, cos, sin, positions, False, False)
        check("rotary_in_place", heads, cos, sin, None, True, True)
    for up in (None, target.tensor(3, 4, 6, seed=1)):
        check("swiglu_forward", x, up)
        check("swiglu_backward", x[..., :3] if up is None else x, x, up)
    for given in (None, bias):
        check("bias_gelu_forward", x, given, True)
        check("bias_gelu_backward", x, x, given, False)
    check("dropout_add", x, x, torch.tensor([3], device=target.device), 0.4)
    check("dropout_add", x, None, None, 0.0)


@dtypes
@pytest.mark.parametrize("columns", [1, 7, 33, 100])
@kernel_targets
def test_nothing_beside_a_tensor_is_read_or_written(target, columns, dtype):
    if target.interpreted and columns > 40:
        pytest.skip("the interpreter is slow, and three widths have every tail")
    a, b = (testing.guarded(target.tensor(5, 2 * columns, dtype=dtype, seed=i), 1) for i in (0, 1))
    bias = testing.guarded(target.tensor(2 * columns, dtype=dtype), 1)
    cos, sin = (testing.guarded(table, 1) for table in _tables(5, columns, target))
    backend = target.backend
    with testing.poisoned_allocations(), testing.guarded_allocations():
        results = [
            *with_gradients(lambda g, u: functional.swiglu(g, u, backend=backend), [a.tensor, b.tensor]),
            *with_gradients(lambda g: functional.swiglu(g, backend=backend), [a.tensor]),
            *with_gradients(lambda x, c: functional.bias_gelu(x, c, backend=backend), [a.tensor, bias.tensor]),
            *with_gradients(
                lambda x, r: functional.dropout_add(x, r, 0.2, seed=1, backend=backend), [a.tensor, b.tensor]
            ),
            *with_gradients(
                lambda x: functional.rotary_embedding(x[None, None], cos.tensor, sin.tensor, backend=backend),
                [a.tensor],
            ),
        ]
    testing.assert_no_nan(*results)
    for guard in (a, b, bias, cos, sin):
        guard.check()


@pytest.mark.parametrize("rows", [1, 100, 3000])
@kernel_targets
def test_every_thread_count_gives_the_same_bits(target, rows):
    if target.device != "cpu" or target.interpreted:
        pytest.skip("only kernels of the CPU run on threads")
    inputs = [target.tensor(rows, 40), target.tensor(40, seed=1)]
    testing.assert_thread_count_invariant(
        lambda x, b: with_gradients(lambda *t: functional.bias_gelu(*t, backend="cpu"), [x, b]), inputs
    )


X, TABLE = torch.ones(1, 2, 3, 8), torch.ones(3, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: functional.rotary_embedding(X[0], TABLE, TABLE), ArgumentValueError, "input.ndim is 3"),
        (lambda: functional.rotary_embedding(X, TABLE[:2], TABLE[:2]), ArgumentValueError, "cos.shape is (2, 4)"),
        (lambda: functional.rotary_embedding(X, TABLE, TABLE[:, :3]), ArgumentValueError, "sin.shape is (3, 3)"),
        (
            lambda: functional.rotary_embedding(X[..., :6], TABLE, TABLE),
            ArgumentValueError,
            "cos.shape[-1] is 4",
        ),
        (
            lambda: functional.rotary_embedding(X, TABLE, TABLE, torch.zeros(2, dtype=torch.int64)),
            ArgumentValueError,
            "positions.shape is (2,)",
        ),
        (
            lambda: functional.rotary_embedding(X, TABLE, TABLE, torch.zeros(3)),
            ArgumentTypeError,
            "positions.dtype is torch.float32",
        ),
        (
            lambda: functional.rotary_embedding(X.clone().requires_grad_(), TABLE, TABLE, in_place=True),
            ArgumentValueError,
            "in_place is True",
        ),
        (lambda: functional.swiglu(X[..., :7]), ArgumentValueError, "gate.shape[-1] is 7"),
        (lambda: functional.swiglu(X, X[0]), ArgumentValueError, "up.shape is (2, 3, 8)"),
        (lambda: functional.swiglu(X, X.half()), ArgumentTypeError, "up.dtype is torch.float16"),
        (lambda: functional.bias_gelu(X, TABLE), ArgumentValueError, "bias.shape is (3, 4)"),
        (lambda: functional.bias_gelu(X, None, "sigmoid"), ArgumentValueError, "approximate is 'sigmoid'"),
        (lambda: functional.dropout_add(X, X[0]), ArgumentValueError, "residual.shape is (2, 3, 8)"),
        (lambda: functional.dropout_add(X, X, 2.0), ArgumentValueError, "dropout_p is 2.0"),
    ],
)
def test_a_bad_argument_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
    assert "expected" in str(raised.value)
