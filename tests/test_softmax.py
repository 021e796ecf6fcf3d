"""Softmax against the float64 oracle, in every layout, and the identities that hold without an oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_support import dtypes, kernel_targets, targets, with_gradients

from fusewright import functional, testing
from fusewright.testing import layouts
from fusewright_kernels import native
from fusewright_kernels.softmax import reference


def softmax(target, input, dim=-1, **keywords):
    return functional.softmax(input, dim, backend=target.backend, **keywords)


def _failures(target, dtype, step=1):
    failures = []
    chosen = [case for case in testing.cases(["softmax"]) if case.dtype is dtype]
    if target is not None and target.interpreted:
        chosen = [case for case in chosen if case.rows * case.columns < 6000]
    backend, device = ("cpu", "cpu") if target is None else (target.backend, target.device)
    for case in chosen[::step]:
        judgements = testing.evaluate(case, backend, device, interpreted=target is not None and target.interpreted)
        failures += [f"{case.id} {name}: {item.failures}" for name, item in judgements.items() if not item.passed]
    return failures


def _assert_oracle(target, input, dim, grad, layout=None, grad_layout=None):
    leaf = (input if layout is None else layout(input)).detach().requires_grad_()
    output = softmax(target, leaf, dim)
    (grad_input,) = torch.autograd.grad(output, leaf, grad if grad_layout is None else grad_layout(grad))
    wide = input.cpu().double().requires_grad_()
    oracle = reference.softmax(wide, dim, torch.float64)
    (oracle_gradient,) = torch.autograd.grad(oracle, wide, grad.cpu().double())
    largest = wide.detach().abs().max().item() if wide.numel() else 0.0
    budget = testing.budget_of(input.dtype, interpreted=target.interpreted).for_logits(2 * largest)
    size = testing.rms(oracle) * (grad.abs().max().item() if grad.numel() else 0.0)
    testing.assert_accurate(output.detach().cpu(), oracle.detach(), budget=budget)
    testing.assert_accurate(grad_input.cpu(), oracle_gradient, "gradient", magnitude=size, budget=budget)


@dtypes
@targets
def test_every_public_case_is_within_its_budget(target, dtype):
    assert _failures(target, dtype) == []


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason=str(native.cpu_unavailable_reason()))
@dtypes
def test_every_instruction_set_of_this_machine_is_within_budget(dtype):
    before = native.cpu_isa()
    failures = {}
    try:
        for isa in native.cpu_isas():
            native.select_cpu_isa(isa)
            failures[isa] = _failures(None, dtype, step=2)
    finally:
        native.select_cpu_isa(before)
    assert failures == {isa: [] for isa in native.cpu_isas()}


@targets
def test_the_widest_row(target):
    if target.interpreted:
        pytest.skip("the interpreter takes minutes for a row of 131072")
    _assert_oracle(target, target.tensor(3, 131072), -1, target.tensor(3, 131072, seed=1))


@pytest.mark.parametrize("shape, dim", [((0, 5), -1), ((5, 0), -1), ((5, 0), 0), ((0,), 0), ((2, 0, 3), 2)])
@dtypes
@targets
def test_empty_tensors(target, shape, dim, dtype):
    output, grad_input = with_gradients(lambda x: softmax(target, x, dim), [target.tensor(*shape, dtype=dtype)])
    assert output.shape == grad_input.shape == shape
    assert output.dtype is grad_input.dtype is dtype


@targets
def test_a_scalar_is_one(target):
    output, grad_input = with_gradients(lambda x: softmax(target, x), [target.tensor()])
    assert output.shape == ()
    assert (output.item(), grad_input.item()) == (1.0, 0.0)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -4])
@dtypes
@targets
def test_every_dimension(target, dim, dtype):
    _assert_oracle(target, target.tensor(3, 5, 4, 7, dtype=dtype), dim, target.tensor(3, 5, 4, 7, dtype=dtype, seed=1))


@targets
def test_layouts_and_shapes_fuzzed(target):
    @layouts.derandomized(10 if target.interpreted else 120)
    @given(
        layouts.row_shapes(), st.integers(0, 3), layouts.dtypes(), layouts.layouts(), layouts.layouts(), layouts.seeds()
    )
    def fuzz(shape, dim, dtype, layout, grad_layout, seed):
        input, grad = target.tensor(*shape, dtype=dtype, seed=seed), target.tensor(*shape, dtype=dtype, seed=seed + 1)
        _assert_oracle(target, input, dim % len(shape), grad, layout, grad_layout)

    fuzz()


@targets
def test_an_expanded_gradient_of_ones_gives_zero(target):
    input = target.tensor(9, 70, requires_grad=True)
    output = softmax(target, input)
    output.sum().backward()
    assert input.grad.abs().max() <= 8 * 2.0**-24 * output.max()


@dtypes
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 100, 257])
@targets
def test_nothing_beside_a_tensor_is_read_or_written(target, columns, dtype):
    for offset in (0, 1):
        for dim in (0, 1):
            input, grad = (testing.guarded(target.tensor(5, columns, dtype=dtype, seed=i), offset) for i in (0, 1))
            out = testing.GuardedTensor((5, columns), dtype=dtype, device=target.device, offset=offset)
            softmax(target, input.tensor, dim, out=out.tensor)
            with testing.poisoned_allocations(), testing.guarded_allocations():
                leaf = input.tensor.requires_grad_()
                output = softmax(target, leaf, dim)
                (grad_input,) = torch.autograd.grad(output, leaf, grad.tensor)
            testing.assert_no_nan(output, grad_input, out.tensor)
            assert testing.bits_equal(out.tensor, output)
            assert grad_input.abs().max() < 1e3
            for guard in (input, grad, out):
                guard.check()


@dtypes
@pytest.mark.parametrize("rows, columns", [(17, 64), (9, 1000), (33, 257)])
@kernel_targets
def test_a_row_does_not_depend_on_its_batch(target, rows, columns, dtype):
    def forward_and_gradient(x, g):
        leaf = x.detach().requires_grad_()
        output = softmax(target, leaf)
        return output, *torch.autograd.grad(output, leaf, g)

    inputs = [target.tensor(rows, columns, dtype=dtype, seed=i) for i in (0, 1)]
    testing.assert_batch_invariant(forward_and_gradient, inputs)


@dtypes
@pytest.mark.parametrize("shape, dim", [((2000, 64), 1), ((3, 5000), 1), ((500, 64), 0)])
@kernel_targets
def test_every_run_and_every_thread_count_gives_the_same_bits(target, shape, dim, dtype):
    if target.interpreted:
        pytest.skip("the interpreter runs one program after the other")
    inputs = [target.tensor(*shape, dtype=dtype)]
    testing.assert_repeatable(lambda x: with_gradients(lambda t: softmax(target, t, dim), [x]), inputs)
    if target.device == "cpu":
        testing.assert_thread_count_invariant(lambda x: with_gradients(lambda t: softmax(target, t, dim), [x]), inputs)


@dtypes
@kernel_targets
def test_identities(target, dtype):
    input = torch.randint(-32, 32, (12, 333), generator=torch.Generator().manual_seed(3)).to(target.device, dtype) / 8
    output, grad_input = with_gradients(lambda x: softmax(target, x), [input])
    assert (output >= 0).all()
    assert (output <= 1).all()
    testing.assert_rows_sum_to(1.0, output)
    # The backward has the output as it was rounded: its rows sum to 1 only to that, and the gradient's to 0.
    testing.assert_rows_sum_to(0.0, grad_input, terms=output)
    testing.assert_column_permutation_equivariant(lambda x: softmax(target, x), [input])
    if dtype is torch.float32:
        testing.assert_shift_invariant(lambda x: softmax(target, x), input, 1024.0)


@dtypes
@targets
def test_constant_rows_are_uniform(target, dtype):
    for value in (0.0, -1e4, 6e4):
        output = softmax(target, torch.full((3, 64), value, dtype=dtype, device=target.device))
        assert torch.equal(output, torch.full_like(output, 1 / 64))


@targets
def test_extreme_logits(target):
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor(
        [[largest, -largest, 0.0], [1e4, 0.0, -1e4], [-1e9, -1e9, -1e9], [-math.inf, 2.0, 2.0], [-1e9, 0.0, 0.0]],
        device=target.device,
    )
    output = softmax(target, rows).cpu()
    third, expected = 1 / 3, torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    expected[2] = third
    torch.testing.assert_close(output, expected, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 37, 99])
@targets
def test_nan_and_infinity_stay_in_their_rows(target, column, poison):
    input = target.tensor(6, 100)
    clean = with_gradients(lambda x: softmax(target, x), [input])
    input[2, column] = poison
    actual = with_gradients(lambda x: softmax(target, x), [input])
    others = [0, 1, 3, 4, 5]
    for result, expected in zip(actual, clean, strict=True):
        assert testing.bits_equal(result[others], expected[others])
        assert result[2].isnan().all()


@targets
def test_a_row_of_minus_infinity_is_nan_as_in_torch(target):
    """Unlike attention, which knows that such a row is masked, softmax has no value to give."""
    input = torch.full((2, 40), -math.inf, device=target.device)
    input[1] = 0.0
    output = softmax(target, input)
    assert output[0].isnan().all()
    assert torch.equal(output[1], torch.full_like(output[1], 1 / 40))
