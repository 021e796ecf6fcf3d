"""The recurrent layers' compiled kernels against their float64 oracle, for every instruction set of this machine."""

import pytest
import torch

from fusewright import functional, testing
from fusewright.testing.case import evaluate
from fusewright.testing.cases.recurrent import OPS, RecurrentCase, cases_of
from fusewright_kernels import native
from fusewright_kernels.recurrent import reference

CASES = [case for op in OPS for case in cases_of(op)]
ISAS = native.cpu_isas() if native.cpu_unavailable_reason() is None else []


def _failures(case, backend):
    return {name: verdict.failures for name, verdict in evaluate(case, backend).items() if not verdict.passed}


def layer_inputs(op, steps, batch, width, hidden, dtype=torch.float32, bound=None):
    """The leaves of a layer by ``functional``'s names; weights within ``bound``, that of torch.nn if None.

    ``op`` is one of OPS or "projected_lstm", whose hidden state has half of the width.
    """
    generator = torch.Generator().manual_seed(1)
    gates = {"lstm": 4, "projected_lstm": 4, "gru": 3}.get(op, 1) * hidden
    state = (hidden + 1) // 2 if op == "projected_lstm" else hidden
    bound = hidden**-0.5 if bound is None else bound
    leaves = {
        "input": torch.randn(steps, batch, width, generator=generator),
        "h0": torch.randn(batch, state, generator=generator),
        "c0": torch.randn(batch, hidden, generator=generator),
    }
    for name, size in (("weight_ih", (gates, width)), ("weight_hh", (gates, state)), ("bias_ih", (gates,)),
                       ("bias_hh", (gates,)), ("weight_hr", (state, hidden))):  # fmt: skip
        leaves[name] = (torch.rand(size, generator=generator) * 2.0 - 1.0) * bound
    if "lstm" not in op:
        del leaves["c0"]
    if op != "projected_lstm":
        del leaves["weight_hr"]
    return {name: tensor.to(dtype) for name, tensor in leaves.items()}


def run(op, leaves, **options):
    return getattr(functional, op.removeprefix("projected_"))(**leaves, **options)


@pytest.fixture(autouse=True)
def nan_in_scratch():
    """Kernels keep their scratch from call to call; what a call of NaN leaves there must not reach the next."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = {
            name: torch.full_like(tensor, float("nan")).requires_grad_()
            for name, tensor in layer_inputs("lstm", 5, 50, 70, 130, dtype).items()
        }
        functional.lstm(**leaves, backend="cpu")[0].sum().backward()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cpu(case):
    with testing.poisoned_allocations():
        assert not _failures(case, "cpu")


@pytest.mark.parametrize("isa", ISAS[1:])
def test_other_instruction_sets(isa):
    """Every fifth case, so that each cell, dtype, size and feature comes up.

    A machine that needs the kernels without fused multiply-add has no such instruction for torch either, so they are
    held to the budget and not to what torch does on this machine.
    """
    best = native.cpu_isa()
    native.select_cpu_isa(isa)
    try:
        failures = {case.id: _failures(case, "cpu") for case in CASES[::5]}
    finally:
        native.select_cpu_isa(best)
    allowed = "that of plain PyTorch" if isa == "generic" else "nothing"
    assert not [
        (case, name, reason)
        for case, results in failures.items()
        for name, reasons in results.items()
        for reason in reasons
        if allowed not in reason
    ]


@pytest.mark.parametrize("case", [case for case in CASES if case.sizes[0] < 20][::4], ids=lambda case: case.id)
def test_reference(case):
    assert not _failures(case, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gain", [0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 64, 1024])
def test_error_grows_no_faster_than_torchs(steps, gain, dtype):
    """Weights that forget, and weights at which a small change neither fades nor grows."""
    leaves = layer_inputs("lstm", steps, 2, 256, 256, dtype, gain * (3.0 / 256.0) ** 0.5)
    oracle = functional.lstm(**{name: tensor.double() for name, tensor in leaves.items()})[0]
    states = (leaves.pop("h0"), leaves.pop("c0"))
    actual = functional.lstm(leaves["input"], *states, *list(leaves.values())[1:], backend="cpu")[0]
    weights = [leaves[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    plain = torch.lstm(leaves["input"], [s[None] for s in states], weights, True, 1, 0.0, False, False, False)[0]
    assert testing.error_in_u(actual, oracle) <= testing.error_in_u(plain, oracle)


@pytest.mark.parametrize("op", [*OPS, "projected_lstm"])
def test_a_row_does_not_depend_on_its_batch_or_on_the_threads(op):
    for dtype in (torch.float32, torch.bfloat16):
        leaves = layer_inputs(op, 6, 51, 33, 130, dtype)
        results = run(op, leaves, backend="cpu")
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(testing.bits_equal(*pair) for pair in zip(run(op, leaves, backend="cpu"), results, strict=True))
        torch.set_num_threads(1)
        for rows in (slice(0, 1), slice(7, 12), slice(3, 51)):
            part = dict(leaves)
            part["input"] = leaves["input"][:, rows]
            part |= {name: leaves[name][rows] for name in ("h0", "c0") if name in leaves}
            output, *last = run(op, part, backend="cpu")
            assert testing.bits_equal(output, results[0][:, rows])
            assert all(testing.bits_equal(a, b[rows]) for a, b in zip(last, results[1:], strict=True))


@pytest.mark.parametrize("op", ["lstm", "projected_lstm"])
def test_backward_is_repeatable_on_any_number_of_threads(op):
    leaves = {name: tensor.requires_grad_() for name, tensor in layer_inputs(op, 9, 20, 48, 160).items()}
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        names = ("input", "h0", "c0", "bias_ih")  # the others are torch's own products
        output = run(op, leaves)[0]
        results.append(torch.autograd.grad(output, [leaves[name] for name in names], torch.ones_like(output)))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(testing.bits_equal(a, b) for a, b in zip(results[0][1:], other[1:], strict=True))
        torch.testing.assert_close(results[0][0], other[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_over_their_whole_range(dtype):
    """Through a plain RNN and a GRU whose weights pass their input on: tanh and sigmoid of every magnitude."""
    values = torch.cat([torch.logspace(-30, 3, 4000), torch.tensor([0.0, 1e30, float("inf")])])
    values = torch.cat([values, -values]).to(dtype)
    one, none = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    tanh = functional.rnn_tanh(values.reshape(1, -1, 1), None, one, none, backend="cpu")[0].flatten()
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(tanh.double(), values.double().tanh(), rtol=1.5 * spacing, atol=0.0)
    # With update gate z and new gate 0 the state 1 becomes z.
    weight = torch.tensor([[0.0], [1.0], [0.0]], dtype=dtype)
    values = values[values.isfinite()]
    ones = torch.ones(values.numel(), 1, dtype=dtype)
    sigmoid = functional.gru(values.reshape(1, -1, 1), ones, weight, 0.0 * weight, backend="cpu")[0].flatten()
    expected = values.double().sigmoid()
    kept = expected > 1e-30
    torch.testing.assert_close(sigmoid[kept].double(), expected[kept], rtol=1.5 * spacing, atol=0.0)
    assert functional.rnn_tanh(torch.full((1, 1, 1), float("nan")), None, torch.ones(1, 1), torch.zeros(1, 1))[
        0
    ].isnan()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("features", [{}, {"lengths": True, "resets": True, "reverse": True}], ids=["plain", "all"])
def test_explicit_gradients_of_the_reference_are_those_of_autograd(op, features):
    """The oracle's backward is written out, so it is checked against the derivative of its forward."""
    leaves = {name: tensor.requires_grad_() for name, tensor in layer_inputs(op, 5, 3, 4, 6, torch.float64).items()}
    names = ("input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weight_hr = None
    if op == "lstm":
        weight_hr = torch.randn(2, 6, dtype=torch.float64).requires_grad_()
        leaves["h0"] = torch.randn(3, 2, dtype=torch.float64).requires_grad_()
        leaves["weight_hh"] = torch.randn(24, 2, dtype=torch.float64).requires_grad_()
    tensors = [*(leaves.get(name) for name in names), weight_hr]
    lengths = torch.tensor([5, 0, 3]) if features else None
    resets = torch.rand(5, 3) < 0.4 if features else None
    arguments = (lengths, resets, op, bool(features))
    outputs = [output for output in reference.recurrent(*tensors, *arguments) if output is not None]
    grads = [torch.randn_like(output) for output in outputs]
    present = [tensor for tensor in tensors if tensor is not None]
    expected = torch.autograd.grad(outputs, present, grads)
    actual = reference.recurrent_backward(*grads, *([None] * (3 - len(grads))), *tensors, *arguments)
    for result, gradient in zip([grad for grad in actual if grad is not None], expected, strict=True):
        torch.testing.assert_close(result, gradient)


def test_long_sequences():
    """More steps than torch's cuDNN layers take."""
    case = RecurrentCase("gru", (70_000, 1, 1, 2), torch.float32)
    leaves = {name: case.inputs()[name] for name in ("input", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    output, h_n = functional.gru(**leaves, backend="cpu")
    again, last = functional.gru(**leaves | {"input": leaves["input"][-500:], "h0": output[-501]}, backend="cpu")
    assert testing.bits_equal(output[-500:], again) and testing.bits_equal(h_n, last)
