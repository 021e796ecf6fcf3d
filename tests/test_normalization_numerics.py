"""Normalisation against the float64 oracle, and the identities that hold without one."""

import pytest
import torch
from op_support import Target, add_norm, add_norms, dtypes, kernel_targets, norm, norms, targets, with_gradients

from fusewright import functional, testing
from fusewright_kernels import native
from fusewright_kernels.normalization import reference

FLOAT32_UNIT = 2.0**-24


def _failures(op, dtype, target, step=1):
    failures = []
    chosen = [case for case in testing.cases([op]) if case.dtype is dtype]
    if target.interpreted:
        chosen = [case for case in chosen if case.rows * case.columns < 6000]
    for case in chosen[::step]:
        judgements = testing.evaluate(case, target.backend, target.device, interpreted=target.interpreted)
        failures += [f"{case.id} {name}: {item.failures}" for name, item in judgements.items() if not item.passed]
    return failures


@dtypes
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
@targets
def test_every_public_case_is_within_its_budget(target, op, dtype):
    assert _failures(op, dtype, target) == []


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason=str(native.cpu_unavailable_reason()))
@dtypes
@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_every_instruction_set_of_this_machine_is_within_budget(op, dtype):
    before = native.cpu_isa()
    failures = {}
    try:
        for isa in native.cpu_isas():
            native.select_cpu_isa(isa)
            failures[isa] = _failures(op, dtype, Target("cpu", "cpu"), step=3)
    finally:
        native.select_cpu_isa(before)
    assert failures == {isa: [] for isa in native.cpu_isas()}


def _accurate(op, target, input, weight, bias, magnitude=None):
    actual = with_gradients(lambda x, w, b: norm(op, target, x, w, b), [input, weight, bias])
    oracle = with_gradients(
        lambda x, w, b: reference.norm(x, w, b, 1, 1e-5, op == "layer_norm", 0.0),
        [tensor.cpu().double() for tensor in (input, weight, bias)],
    )
    for index, (result, expected) in enumerate(zip(actual, oracle, strict=True)):
        direction = "forward" if index == 0 else "gradient"
        testing.assert_accurate(result.cpu(), expected, direction, magnitude=magnitude, name=f"result {index}")


@norms
@targets
def test_the_widest_row(target, op):
    if target.interpreted:
        pytest.skip("the interpreter takes minutes for a row of 131072")
    width = 131072
    _accurate(op, target, *(target.tensor(*size, seed=i) for i, size in enumerate([(3, width), (width,), (width,)])))


@dtypes
@norms
@targets
def test_no_rows(target, op, dtype):
    input, weight, bias = target.tensor(0, 16, dtype=dtype), target.tensor(16), target.tensor(16)
    output, grad_input, grad_weight, grad_bias = with_gradients(
        lambda x, w, b: norm(op, target, x, w, b), [input, weight, bias]
    )
    assert output.shape == grad_input.shape == (0, 16)
    assert output.dtype is dtype
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    assert torch.equal(grad_bias, torch.zeros_like(bias))


@targets
def test_several_normalized_dimensions_and_none_in_front(target):
    input, weight = target.tensor(4, 3, 5, 7), target.tensor(5, 7, seed=1)
    flat = norm("layer_norm", target, input.flatten(2), weight.flatten())
    assert torch.equal(norm("layer_norm", target, input, weight, normalized_shape=(5, 7)).flatten(2), flat)
    one_row = norm("rms_norm", target, input, normalized_shape=input.shape)
    oracle = reference.norm(input.cpu().double(), None, None, 4, 1e-5, False, 0.0)
    testing.assert_accurate(one_row.cpu(), oracle)


@targets
def test_a_long_bfloat16_weight_gradient_is_summed_in_float32(target):
    if target.interpreted:
        pytest.skip("the interpreter takes seconds for each thousand rows")
    input = target.tensor(8192, 64, dtype=torch.bfloat16)
    weight = target.tensor(64, dtype=torch.bfloat16, seed=1)
    grad = target.tensor(8192, 64, dtype=torch.bfloat16, seed=2).abs()  # sums that grow to 6500
    leaf = weight.clone().requires_grad_()
    norm("layer_norm", target, input, leaf, leaf).backward(grad)
    wide = weight.cpu().double().requires_grad_()
    reference.norm(input.cpu().double(), wide, wide, 1, 1e-5, True, 0.0).backward(grad.cpu().double())
    assert testing.error_in_u(leaf.grad.cpu(), wide.grad) <= 6.0


@dtypes
@targets
def test_one_column_gives_a_zero_weight_gradient(target, dtype):
    input, weight = target.tensor(300, 1, dtype=dtype), target.tensor(1, seed=1)
    output, grad_input, grad_weight, _ = with_gradients(
        lambda x, w, b: norm("layer_norm", target, x, w, b), [input, weight, torch.full_like(weight, 0.5)]
    )
    assert torch.equal(output, torch.full_like(output, 0.5))
    assert torch.equal(grad_weight, torch.zeros_like(grad_weight))
    # Terms of the input gradient are 1 / sqrt(eps) large before they cancel; a multiply-add leaves their rounding.
    assert grad_input.abs().max() <= 16 * FLOAT32_UNIT / 1e-5**0.5 * weight.abs().max()


@pytest.mark.parametrize("columns", [64, 1000, 4097])
@targets
def test_a_mean_of_1e4_with_spread_1_stays_exact(target, columns):
    mean = 1e4
    input = (target.tensor(64, columns) + mean).requires_grad_()
    output = norm("layer_norm", target, input)
    oracle = reference.norm(input.detach().cpu().double(), None, None, 1, 1e-5, True, 0.0)
    assert (output.detach().cpu().double() - oracle).abs().max() <= 32 * FLOAT32_UNIT * (1 + mean)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e4])
@dtypes
@targets
def test_constant_rows_give_the_bias(target, dtype, value):
    input = torch.full((5, 1000), value, dtype=dtype, device=target.device)
    bias = target.tensor(1000, dtype=dtype)
    output = norm("layer_norm", target, input, None, bias)
    # What is left of the mean's rounding is at most a few units of the value, times 1 / sqrt(eps).
    allowed = 8 * FLOAT32_UNIT * abs(value) / 1e-5**0.5
    difference = (output.double() - bias.double()).abs()
    assert (difference <= allowed + torch.finfo(dtype).eps * (bias.double().abs() + allowed)).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 37, 99])
@norms
@targets
def test_nan_and_infinity_stay_in_their_rows(target, op, column, poison):
    input, weight, bias = target.tensor(6, 100), target.tensor(100, seed=1), target.tensor(100, seed=2)
    clean = with_gradients(lambda x: norm(op, target, x, weight, bias), [input])
    input[2, column] = poison
    output, grad_input = with_gradients(lambda x: norm(op, target, x, weight, bias), [input])
    others = [0, 1, 3, 4, 5]
    assert testing.bits_equal(output[others], clean[0][others])
    assert testing.bits_equal(grad_input[others], clean[1][others])
    expected = reference.norm(input.cpu(), weight.cpu(), bias.cpu(), 1, 1e-5, op == "layer_norm", 0.0)
    assert torch.equal(output.cpu().isnan(), expected.isnan())


@add_norms
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@targets
def test_the_sum_is_normalised_as_it_is_stored(target, op, residual_dtype):
    input = target.tensor(40, 256, dtype=torch.bfloat16)
    residual = target.tensor(40, 256, dtype=residual_dtype, seed=1)
    output, stream = add_norm(op, target, input, residual)
    exact = input.float() + residual.float()
    assert output.dtype is torch.bfloat16
    assert testing.bits_equal(stream, exact.to(residual_dtype))
    oracle = reference.norm(stream.cpu().double(), None, None, 1, 1e-5, op == "add_layer_norm", 0.0)
    # Of the unrounded sum it would be another unit off.
    assert testing.error_in_u(output.cpu(), oracle) < 1.0


@add_norms
@targets
def test_the_residual_stream_can_change_its_type(target, op):
    input, residual = target.tensor(4, 64, dtype=torch.bfloat16), target.tensor(4, 64, dtype=torch.bfloat16, seed=1)
    _, stream = add_norm(op, target, input, residual, residual_dtype=torch.float32)
    assert stream.dtype is torch.float32
    assert testing.bits_equal(stream, input.float() + residual.float())


@norms
@targets
def test_a_zero_centered_weight_is_the_weight_plus_one(target, op):
    input, weight = target.tensor(8, 96), (target.tensor(96, seed=1) * 64).round() / 64
    zero_centered = norm(op, target, input, weight - 1.0, zero_centered_weight=True)
    assert torch.equal(zero_centered, norm(op, target, input, weight))


@norms
@kernel_targets
def test_scale_shift_and_permutation(target, op):
    input = torch.randint(-256, 256, (12, 333), generator=torch.Generator().manual_seed(3)).to(target.device) / 64.0
    testing.assert_scale_invariant(lambda x: norm(op, target, x, eps=0.0), input)
    testing.assert_row_permutation_equivariant(lambda x: norm(op, target, x), [input])

    def with_weight_rows(x, w):
        return norm(op, target, x, w[0])

    testing.assert_column_permutation_equivariant(with_weight_rows, [input, target.tensor(1, 333, seed=1)])
    if op == "layer_norm":
        testing.assert_shift_invariant(lambda x: norm(op, target, x), input, 512.0, magnitude=512.0)


@dtypes
@norms
@kernel_targets
def test_gradient_identities(target, op, dtype):
    input = target.tensor(16, 200, dtype=dtype)
    output, grad_input = with_gradients(lambda x: norm(op, target, x, eps=0.0), [input])
    assert output.abs().max() > 1.0
    if op == "layer_norm":
        testing.assert_rows_sum_to(0.0, grad_input)
        testing.assert_inner_products(0.0, grad_input, input - input.mean(-1, keepdim=True))
    else:
        testing.assert_inner_products(0.0, grad_input, input)


@norms
@targets
def test_out_is_filled_and_returned(target, op):
    input, weight = target.tensor(7, 130), target.tensor(130, seed=1)
    guard = testing.GuardedTensor((7, 130), dtype=torch.float32, device=target.device)
    assert norm(op, target, input, weight, out=guard.tensor) is guard.tensor
    guard.check("out")
    assert testing.bits_equal(guard.tensor, norm(op, target, input, weight))


def test_float64_is_served_without_a_warning(recwarn):
    input = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(functional.layer_norm(input, 8), torch.nn.functional.layer_norm(input, (8,)))
    assert not recwarn.list
