"""The embedding with positions against its float64 oracle, forward, backward and twice."""

import pytest
import torch
from op_support import dtypes, kernel_targets, targets
from torch.library import opcheck

from fusewright import functional, testing
from fusewright_kernels import library, native
from fusewright_kernels.checks import ArgumentIndexError, ArgumentTypeError, ArgumentValueError
from fusewright_kernels.embedding import reference

WORDS, POSITIONS = 19, 11


def _indices(rows, *size, seed=0, device="cpu"):
    return torch.randint(0, rows, size, generator=torch.Generator().manual_seed(seed)).to(device)


def _given(target, dtype, columns, table_dtype=None):
    weight = target.tensor(WORDS, columns, dtype=dtype)
    table = target.tensor(POSITIONS, columns, dtype=table_dtype or dtype, seed=1)
    return weight, table, _indices(WORDS, 3, 7, device=target.device)


def _assert_as_oracle(target, weight, table, tokens, positions=None, **keywords):
    leaves = [tensor.detach().requires_grad_() for tensor in (weight, table)]
    output = functional.embedding(tokens, *leaves, positions, backend=target.backend, **keywords)
    grad = target.tensor(*output.shape, dtype=weight.dtype, seed=3)
    gradients = torch.autograd.grad(output, leaves, grad)
    wide = [tensor.cpu().double().requires_grad_() for tensor in (weight, table)]
    rows = torch.arange(tokens.shape[-1]).expand(tokens.shape) if positions is None else positions.cpu()
    padding = keywords.get("padding_idx")
    vectors = torch.nn.functional.embedding(tokens.cpu(), wide[0], padding)
    oracle = vectors * keywords.get("scale", 1.0) + torch.nn.functional.embedding(rows.expand(tokens.shape), wide[1])
    expected = torch.autograd.grad(oracle, wide, grad.cpu().double())
    budget = testing.budget_of(weight.dtype, interpreted=target.interpreted)
    testing.assert_accurate(
        output.detach().cpu(), oracle.detach(), magnitude=testing.rms(vectors.detach()), budget=budget
    )
    # What a row's gradient adds up: not less than one output's gradient.
    for gradient, exact in zip(gradients, expected, strict=True):
        testing.assert_accurate(gradient.cpu(), exact, "gradient", magnitude=testing.rms(grad), budget=budget)


@dtypes
@targets
@pytest.mark.parametrize("columns", [1, 31, 48, 130, 600])
def test_forward_and_gradients(target, dtype, columns):
    weight, table, tokens = _given(target, dtype, columns)
    _assert_as_oracle(target, weight, table, tokens)
    _assert_as_oracle(target, weight, table, tokens, _indices(POSITIONS, 7, seed=2, device=target.device), scale=2.5)
    positions = _indices(POSITIONS, 3, 7, seed=2, device=target.device)
    _assert_as_oracle(target, weight, table, tokens.int(), positions, padding_idx=int(tokens[0, 0]) - WORDS)


@dtypes
@targets
def test_a_float32_table(target, dtype):
    _assert_as_oracle(target, *_given(target, dtype, 70, torch.float32))


@kernel_targets
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_a_frequent_token(target, count):
    """In bfloat16, where sums in the type itself would stop growing at 256 of equal parts."""
    weight = torch.zeros(300, 8, dtype=torch.bfloat16, device=target.device, requires_grad=True)
    tokens = torch.full((count,), 7, device=target.device)
    output = functional.embedding(tokens, weight, backend=target.backend)
    (gradient,) = torch.autograd.grad(output, weight, torch.ones_like(output))
    expected = torch.zeros(300, 8)
    expected[7] = count
    torch.testing.assert_close(gradient.cpu(), expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason=str(native.cpu_unavailable_reason()))
@dtypes
def test_every_instruction_set_and_thread_count_of_this_machine(dtype):
    weight, table, tokens = torch.randn(50, 259).to(dtype), torch.randn(64, 259).to(dtype), _indices(50, 5, 64)
    before, threads = native.cpu_isa(), torch.get_num_threads()
    forward, backward = (library.overload(f"embedding_{name}", "cpu") for name in ("forward", "backward"))
    rows = torch.arange(64).expand(5, 64)
    grad = torch.randn(5, 64, 259).to(dtype)
    results = []
    try:
        for isa in native.cpu_isas():
            native.select_cpu_isa(isa)
            for count in (1, 3):
                torch.set_num_threads(count)
                guards = [testing.guarded(tensor) for tensor in (weight, table, grad)]
                with testing.guarded_allocations():
                    output = forward(tokens, guards[0].tensor, guards[1].tensor, rows, 1.5)
                    gradient = backward(guards[2].tensor, tokens, 50, 1.5, 3, dtype)
                for guard in guards:
                    guard.check()
                results.append((output, gradient))
    finally:
        native.select_cpu_isa(before)
        torch.set_num_threads(threads)
    for output, gradient in results:
        torch.testing.assert_close(output, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])
        assert not gradient[3].any()


@targets
def test_nothing_to_do(target):
    weight = target.tensor(4, 6, requires_grad=True)
    tokens = torch.zeros(2, 0, dtype=torch.int64, device=target.device)
    output = functional.embedding(tokens, weight, target.tensor(3, 6), backend=target.backend)
    assert output.shape == (2, 0, 6)
    (gradient,) = torch.autograd.grad(output.sum(), weight)
    assert not gradient.any()
    single = functional.embedding(torch.tensor(2, device=target.device), weight, backend=target.backend)
    assert torch.equal(single, weight[2])


@kernel_targets
def test_an_index_that_nobody_checked_gives_nan(target):
    weight, table = target.tensor(4, 6), target.tensor(5, 6)
    forward = library.overload("embedding_forward", target.backend)
    tokens = torch.tensor([0, 4, -1, 1], device=target.device)
    rows = torch.tensor([0, 0, 0, 5], device=target.device)
    assert forward(tokens, weight, table, rows, 1.0).isnan().any(1).tolist() == [False, True, True, True]
    grad = torch.ones(4, 6, device=target.device)
    gradient = library.overload("embedding_backward", target.backend)(grad, tokens, 4, 1.0, -1, torch.float32)
    assert gradient.sum(1).tolist() == [6.0, 6.0, 0.0, 0.0]


@targets
def test_second_derivatives_and_transforms(target):
    weight, table, tokens = _given(target, torch.float32, 5)

    def function(weight, table):
        return functional.embedding(tokens, weight, table, scale=0.5, backend=target.backend).square().sum()

    def plain(weight, table):
        rows = torch.arange(7, device=target.device).expand(3, 7)
        return reference.embedding(tokens, weight, table, rows, 0.5).square().sum()

    hessian, expected = (
        torch.func.jacrev(torch.func.jacrev(f, argnums=(0, 1)), argnums=(0, 1))(weight, table)
        for f in (function, plain)
    )
    torch.testing.assert_close(hessian, expected)
    many = torch.stack([tokens, tokens.flip(0)])
    for axes, first in ((None, weight), (0, torch.stack([weight, 2 * weight]))):
        mapped = torch.vmap(lambda t, w: functional.embedding(t, w, table, backend=target.backend), in_dims=(0, axes))(
            many, first
        )
        for sample in range(2):
            single = functional.embedding(many[sample], weight if axes is None else first[sample], table)
            torch.testing.assert_close(mapped[sample], single)


@kernel_targets
def test_opcheck_and_compile(target):
    weight, table, tokens = _given(target, torch.float32, 40)
    rows = torch.arange(7, device=target.device).expand(3, 7)
    check = {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(library.overload("embedding_forward", target.backend), (tokens, weight, table, rows, 0.5), **check)
    arguments = (target.tensor(3, 7, 40), tokens, WORDS, 0.5, 2, torch.float32)
    opcheck(library.overload("embedding_backward", target.backend), arguments, **check)
    leaf = weight.clone().requires_grad_()

    def function(leaf):
        return functional.embedding(tokens, leaf, table, backend=target.backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(compiled, function(leaf))
    assert torch.equal(*(torch.autograd.grad(result.sum(), leaf)[0] for result in (compiled, function(leaf))))


W = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((torch.tensor([4]), W), {}, ArgumentIndexError, "tokens holds 4"),
        ((torch.tensor([-1]), W), {}, IndexError, "tokens holds -1"),
        ((torch.tensor([1.0]), W), {}, ArgumentTypeError, "tokens.dtype is torch.float32"),
        ((torch.tensor([1]), W[0]), {}, ArgumentValueError, "weight.shape is"),
        ((torch.tensor([1]), W.long()), {}, ArgumentTypeError, "weight.dtype is torch.int64"),
        ((torch.tensor([1]), W, torch.ones(3, 5)), {}, ArgumentValueError, "table.shape is"),
        ((torch.tensor([1]), W, torch.ones(3, 6).half()), {}, ArgumentTypeError, "table.dtype is torch.float16"),
        ((torch.zeros(9, dtype=torch.int64), W, torch.ones(3, 6)), {}, ArgumentValueError, "table.shape is"),
        ((torch.tensor([1]), W, W, torch.tensor([4])), {}, ArgumentIndexError, "positions holds 4"),
        ((torch.tensor([1]), W, W, torch.tensor([1, 2])), {}, ArgumentValueError, "positions.shape is"),
        ((torch.tensor([1]), W, None, torch.tensor([1])), {}, ArgumentValueError, "positions is given"),
        ((torch.tensor([1]), W), {"padding_idx": 4}, ArgumentValueError, "padding_idx is 4"),
        ((torch.tensor([1]), W), {"padding_idx": True}, ArgumentTypeError, "padding_idx is a bool"),
    ],
)
def test_bad_arguments(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        functional.embedding(*arguments, **keywords)
