"""Dropout in the fused addition: the mask, its seed, and torch's generator."""

import pytest
import torch
from op_support import add_norm, add_norms, targets

from fusewright import testing
from fusewright_kernels import philox


def _stream(target, dropout_p, seed=None, rows=30, columns=70, **keywords):
    """What dropout leaves of a tensor of ones, times 1 - p: the mask that was used."""
    ones = torch.ones(rows, columns, device=target.device)
    zeros = torch.zeros(rows, columns, device=target.device)
    return add_norm("add_rms_norm", target, ones, zeros, dropout_p=dropout_p, seed=seed, **keywords)[1]


# Rows that are not whole blocks of four words, and a probability whose threshold is not a round number.
@pytest.mark.parametrize("columns", [1, 2, 4, 31, 70, 256])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@targets
def test_the_mask_is_philox(target, columns, dropout_p):
    seed = 2**61 + 12345  # above 2^32: both words of the key count
    stream = _stream(target, dropout_p, seed, columns=columns)
    keep = philox.keep_mask(torch.tensor([seed]), 30, columns, dropout_p)
    assert torch.equal(stream.cpu() != 0, keep)
    torch.testing.assert_close(stream.cpu(), keep / (1 - dropout_p), rtol=3e-7, atol=0.0)


@add_norms
@targets
def test_gradients_see_the_mask_of_the_forward(target, op):
    input = torch.ones(20, 48, device=target.device, requires_grad=True)
    residual = target.tensor(20, 48, requires_grad=True)
    _, stream = add_norm(op, target, input, residual, dropout_p=0.4, seed=9)
    keep = philox.keep_mask(torch.tensor([9]), 20, 48, 0.4).to(target.device)
    grad_input, grad_residual = torch.autograd.grad(stream.sum(), (input, residual))
    torch.testing.assert_close(grad_input, keep / 0.6, rtol=3e-7, atol=0.0)
    assert torch.equal(grad_residual, torch.ones_like(grad_residual))


@targets
def test_masks_keep_the_right_share_and_differ_by_seed(target):
    if target.interpreted:
        pytest.skip("the interpreter is slow on a sample large enough to judge")
    kept = [(_stream(target, 0.3, seed, 200, 1000) != 0).double() for seed in (0, 1, 2**32)]
    for mask in kept:
        # Five standard deviations of 200000 draws.
        assert abs(mask.mean().item() - 0.7) < 5 * (0.3 * 0.7 / mask.numel()) ** 0.5
    assert all((left != right).double().mean() > 0.4 for left, right in zip(kept, kept[1:] + kept[:1], strict=True))


@targets
def test_an_explicit_seed_repeats_and_leaves_the_generator_alone(target):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = _stream(target, 0.5, 17), _stream(target, 0.5, 17)
    assert torch.equal(first, second)
    assert torch.equal(_stream(target, 0.5, torch.tensor([17], device=target.device)), first)
    assert torch.equal(torch.get_rng_state(), state)


@targets
def test_without_a_seed_the_default_generator_decides(target):
    torch.manual_seed(1)
    first, second = _stream(target, 0.5), _stream(target, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(_stream(target, 0.5), first)
    assert torch.equal(_stream(target, 0.5), second)


@targets
def test_no_dropout_draws_nothing(target):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(_stream(target, 0.0), torch.ones(30, 70, device=target.device))
    assert torch.equal(torch.get_rng_state(), state)


@add_norms
@targets
def test_full_dropout_leaves_the_residual(target, op):
    input = target.tensor(6, 40, requires_grad=True)
    residual, weight = target.tensor(6, 40, seed=1, requires_grad=True), target.tensor(40, seed=2)
    output, stream = add_norm(op, target, input, residual, weight, dropout_p=1.0, seed=3)
    expected, _ = add_norm(op, target, torch.zeros_like(input), residual, weight)
    assert torch.equal(stream, residual)
    assert testing.bits_equal(output, expected)
    grad_input, grad_residual = torch.autograd.grad((output * stream).sum(), (input, residual))
    assert torch.equal(grad_input, torch.zeros_like(input))
    assert grad_residual.abs().sum() > 0


@targets
def test_dropped_nan_and_infinity_do_not_reach_the_result(target):
    input, residual = target.tensor(8, 64), target.tensor(8, 64, seed=1)
    keep = philox.keep_mask(torch.tensor([5]), 8, 64, 0.5).to(target.device)
    poisoned = torch.where(keep, input, torch.tensor(float("nan"), device=target.device))
    expected = add_norm("add_layer_norm", target, input, residual, dropout_p=0.5, seed=5)
    actual = add_norm("add_layer_norm", target, poisoned, residual, dropout_p=0.5, seed=5)
    assert all(testing.bits_equal(left, right) for left, right in zip(actual, expected, strict=True))
