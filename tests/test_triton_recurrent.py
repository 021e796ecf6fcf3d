"""Triton kernels of the recurrent cells against the float64 formula; interpreted where there is no GPU."""

import pytest
import torch
from test_recurrent_numerics import layer_inputs
from triton_interpreter import patch_language_once_per_launch

from fusewright import functional, testing
from fusewright.testing.case import evaluate
from fusewright.testing.cases.recurrent import RecurrentCase
from fusewright_kernels import library, triton_support
from fusewright_kernels.checks import ArgumentValueError

pytestmark = pytest.mark.skipif(
    triton_support.unavailable_reason() is not None, reason=str(triton_support.unavailable_reason())
)
DEVICE = "cpu" if triton_support.INTERPRETED else "cuda"
OPS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ops = pytest.mark.parametrize("op", OPS)
NAMES = ("input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    patch_language_once_per_launch(monkeypatch)


class CellCase(RecurrentCase):
    """A single step by the cell of ``functional``."""

    def ours(self, inputs, backend):
        def step(input, reverse, **leaves):
            return cell(self.op, dict(leaves, input=input), backend)

        return self._results(inputs, step)


def cell(op, leaves, backend):
    """Output, h_n and an LSTM's c_n."""
    states = [leaves[name] for name in ("h0", "c0") if name in leaves]
    weights = [leaves.get(name) for name in NAMES[3:]]
    function = getattr(functional, f"{op}_cell")
    after = function(leaves["input"][0], states if op == "lstm" else states[0], *weights, backend=backend)
    after = after if op == "lstm" else (after,)
    return after[0].unsqueeze(0), *after


# T, B, I, H. The widest takes two tiles; in float32 torch's own sums over its gates are as far off as the budget.
SIZES = [(dtype, sizes) for dtype in DTYPES for sizes in ((1, 3, 5, 7), (1, 35, 20, 100))]
SIZES += [(dtype, (1, 2, 9, 1030)) for dtype in DTYPES[1:]]


@ops
@pytest.mark.parametrize("dtype, sizes", SIZES, ids=str)
def test_numerics(op, dtype, sizes):
    features = () if sizes[1] == 3 or op == "rnn_relu" else ("no_bias",)
    with testing.poisoned_allocations():
        judged = evaluate(CellCase(op, sizes, dtype, features), "triton", DEVICE, interpreted=DEVICE == "cpu")
    assert not {name: verdict.failures for name, verdict in judged.items() if not verdict.passed}


@ops
def test_nothing_beside_the_tensors_is_read_or_written(op):
    leaves = {name: tensor.to(DEVICE) for name, tensor in layer_inputs(op, 1, 5, 7, 33).items()}
    guards = {name: testing.guarded(tensor, offset=1) for name, tensor in leaves.items()}
    results = []
    for tensors in (leaves, {name: guard.tensor for name, guard in guards.items()}):
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with testing.poisoned_allocations():
            outputs = cell(op, tensors, "triton")
            grads = torch.autograd.grad(sum(output.sum() for output in outputs), list(tensors.values()))
        results.append([*outputs, *grads])
    for actual, expected in zip(*results, strict=True):
        testing.assert_no_nan(actual)
        torch.testing.assert_close(actual, expected)
    for name, guard in guards.items():
        guard.check(name)


@ops
def test_any_strides_empty_batches_and_some_gradients(op):
    leaves = {name: tensor.to(DEVICE) for name, tensor in layer_inputs(op, 1, 4, 5, 20).items()}
    spread = {name: torch.stack([tensor, tensor + 1.0], -1)[..., 0] for name, tensor in leaves.items()}
    expected = cell(op, leaves, "reference")
    for actual, other in zip(cell(op, spread, "triton"), expected, strict=True):
        torch.testing.assert_close(actual, other)
    empty = {name: t[:, :0] if name == "input" else t[:0] if name in ("h0", "c0") else t for name, t in leaves.items()}
    empty = {name: tensor.detach().requires_grad_() for name, tensor in empty.items()}
    output = cell(op, empty, "triton")[0]
    grads = torch.autograd.grad(output.sum(), list(empty.values()))
    assert output.shape == (1, 0, 20) and all(gradient.eq(0).all() for gradient in grads)
    for wanted in (("input",), ("h0",), ("weight_hh", "bias_ih")):
        grads = []
        for backend in ("triton", "reference"):
            given = dict(leaves, **{name: leaves[name].detach().requires_grad_() for name in wanted})
            grads.append(torch.autograd.grad(cell(op, given, backend)[0].sum(), [given[name] for name in wanted]))
        for actual, other in zip(*grads, strict=True):
            torch.testing.assert_close(actual, other)


@ops
def test_opcheck(op):
    forward, backward = (library.overload(f"recurrent_{name}", "triton") for name in ("forward", "backward"))
    leaves = {name: tensor.to(DEVICE) for name, tensor in layer_inputs(op, 1, 3, 5, 6).items()}
    arguments = (*(leaves.get(name) for name in NAMES), None, None, None, op, False)
    checks = ("test_schema", "test_faketensor")
    for save_states in (False, True):
        torch.library.opcheck(forward, (*arguments, save_states), test_utils=checks)
    output, h_n, c_n, gates, cells = forward(*arguments, True)
    every = torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n) if op == "lstm" else None
    for grads, needs in ((every, (True, True, True)), ((None, every[1], None), (False, True, False))):
        torch.library.opcheck(backward, (*grads, output, gates, cells, *arguments, *needs), test_utils=checks)


def test_saturated_gates_and_nan():
    """Gates far beyond their range saturate; NaN reaches its own unit alone."""
    leaves = {name: tensor.to(DEVICE) for name, tensor in layer_inputs("lstm", 1, 2, 3, 4).items()}
    leaves["bias_ih"] = torch.tensor([1e30, -1e30, 200.0, -200.0] * 4, device=DEVICE)
    leaves["c0"][0, 1] = float("nan")
    actual, expected = (cell("lstm", leaves, backend) for backend in ("triton", "reference"))
    for result, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, other, equal_nan=True)
    assert actual[2].isnan().sum() == 1


def test_sequences_are_refused():
    leaves = {name: tensor.to(DEVICE) for name, tensor in layer_inputs("gru", 2, 3, 5, 6).items()}
    with pytest.raises(ArgumentValueError, match="triton"):
        functional.gru(**leaves, backend="triton")
    arguments = (*(leaves.get(name) for name in NAMES), None, None, None, "gru", False)
    with pytest.raises(ArgumentValueError, match="single step"):
        library.overload("recurrent_forward", "triton")(*arguments, False)
