"""The persistent recurrent kernels on a GPU: what the emulator shows of them must hold there."""

import pytest
import torch
from test_recurrent_numerics import layer_inputs

from fusewright import functional, testing
from fusewright.testing.case import evaluate
from fusewright.testing.cases.recurrent import OPS, RecurrentCase, cases_of
from fusewright_kernels import dispatch
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.recurrent import backend_native

pytestmark = pytest.mark.gpu

CASES = [case for op in OPS for case in cases_of(op) if case.dtype in LOW_PRECISION]
# Beside registers the matrix fills shared memory; then several groups of units share a multiprocessor.
LARGE = [RecurrentCase("lstm", (9, batch, 16, hidden), torch.bfloat16) for batch in (1, 70) for hidden in (1500, 2600)]


@pytest.fixture(autouse=True)
def kernels() -> None:
    reason = backend_native.refuse_cuda(dispatch.Call("recurrent", "cuda", (torch.bfloat16,), 3))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.id)
def test_cases(case):
    verdicts = evaluate(case, "cuda", "cuda")
    assert not [verdict.failures for verdict in verdicts.values() if not verdict.passed]


def _leaves(op: str, *sizes: int) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in layer_inputs(op, *sizes, torch.bfloat16).items()}


@pytest.mark.parametrize("op", ["lstm", "gru", "rnn_tanh"])
def test_repeats_bit_for_bit(op):
    leaves = {name: tensor.requires_grad_() for name, tensor in _leaves(op, 300, 40, 64, 512).items()}

    def results() -> list[torch.Tensor]:
        output = getattr(functional, op)(**leaves, backend="cuda")[0]
        return [output, *torch.autograd.grad(output.sum(), [leaves["h0"], leaves["weight_hh"]])]

    first = results()
    for _ in range(20):
        assert all(testing.bits_equal(*pair) for pair in zip(results(), first, strict=True))


def test_a_graph_replays_it_with_other_lengths():
    leaves = _leaves("lstm", 12, 6, 32, 200)
    lengths = torch.full((6,), 12, device="cuda")
    functional.lstm(**leaves, lengths=lengths, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = functional.lstm(**leaves, lengths=lengths, backend="cuda")
    for values in ([12, 0, 5, 7, 1, 11], [3] * 6):
        lengths.copy_(torch.tensor(values))
        leaves["input"].normal_()
        graph.replay()
        expected = functional.lstm(**leaves, lengths=lengths, backend="cuda")
        assert all(testing.bits_equal(*pair) for pair in zip(captured, expected, strict=True))


def test_many_steps():
    """More than torch's cuDNN layers take."""
    leaves = _leaves("gru", 70_000, 2, 1, 64)
    output, h_n = functional.gru(**leaves, backend="cuda")
    part = leaves | {"input": leaves["input"][-500:], "h0": output[-501]}
    again, last = functional.gru(**part, backend="cuda")
    assert testing.bits_equal(output[-500:], again) and testing.bits_equal(h_n, last)


def test_streams_do_not_share_epochs():
    leaves = _leaves("lstm", 50, 8, 32, 128)
    expected = functional.lstm(**leaves, backend="cuda")[0]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = []
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            outputs.append(functional.lstm(**leaves, backend="cuda")[0])
    torch.cuda.synchronize()
    assert all(testing.bits_equal(output, expected) for output in outputs)
