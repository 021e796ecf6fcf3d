"""The persistent recurrent kernels on a CPU, in the emulator: against the oracle under many schedules, and with faults
put into them.
"""

import ctypes
import functools
import shutil
from pathlib import Path

import emulation_support
import pytest
import torch
from test_recurrent_numerics import layer_inputs
from torch import Tensor

from fusewright import functional, testing
from fusewright.testing.case import evaluate
from fusewright.testing.cases.recurrent import OPS, RecurrentCase
from fusewright_kernels import toolchain
from fusewright_kernels.checks import LOW_PRECISION

NATIVE = Path(__file__).parent / "native"
LAUNCH_FAILURE = 719
# Every group of units on a multiprocessor of its own, several sets of them, and several groups on each.
MULTIPROCESSORS = (9, 32, 2)

pytestmark = emulation_support.needs_emulator


@pytest.fixture(autouse=True)
def multiprocessors_of_other_tests():
    yield
    emulation_support.set_multiprocessors(3)


SHAPES = (
    ((3, 11, 5, 72), ()),
    ((3, 11, 5, 72), ("lengths", "resets")),
    ((4, 9, 3, 20), ("no_bias", "reverse", "lengths")),
    ((7, 1, 40, 65), ()),
    ((2, 40, 9, 24), ()),
    ((1, 3, 5, 7), ()),
)
CASES = [
    RecurrentCase(op, sizes, LOW_PRECISION[(number + index) % 2], features)
    for number, op in enumerate(OPS)
    for index, (sizes, features) in enumerate(SHAPES)
    if (op, "no_bias" in features) != ("rnn_relu", True)  # nothing would keep its units away from 0
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number].id)
def test_cases(number):
    emulation_support.set_multiprocessors(MULTIPROCESSORS[number % 3])
    with emulation_support.cuda_serves_the_cpu():
        emulation_support.set_seed(number)
        verdicts = evaluate(CASES[number], "cuda")
    assert not [verdict.failures for verdict in verdicts.values() if not verdict.passed]


def _with_gradients(op: str, leaves: dict[str, Tensor], **options: Tensor) -> list[Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    output, *_ = getattr(functional, op)(**leaves, **options, backend="cuda")
    return [output, *torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))]


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_schedules_and_the_number_of_multiprocessors_change_no_bit(op):
    with emulation_support.cuda_serves_the_cpu():
        leaves = layer_inputs(op, 3, 10, 4, 40, torch.bfloat16)
        emulation_support.set_multiprocessors(5)
        first = _with_gradients(op, leaves)
        for seed in range(1, 13):
            emulation_support.set_seed(seed)
            emulation_support.set_multiprocessors((5, 12, 2)[seed % 3])
            for actual, expected in zip(_with_gradients(op, leaves), first, strict=True):
                assert testing.bits_equal(actual, expected), f"schedule {seed}"


def test_a_sample_does_not_depend_on_its_batch():
    with emulation_support.cuda_serves_the_cpu():
        leaves = layer_inputs("gru", 2, 35, 4, 24, torch.float16)
        whole = functional.gru(**leaves, backend="cuda")[0]
        part = leaves | {"input": leaves["input"][:, 20:22], "h0": leaves["h0"][20:22]}
        assert testing.bits_equal(functional.gru(**part, backend="cuda")[0], whole[:, 20:22])


def test_what_lies_behind_the_end_reaches_nothing():
    lengths = [3, 0, 1, 2]
    with emulation_support.cuda_serves_the_cpu():
        leaves = layer_inputs("lstm", 3, 4, 5, 20, torch.bfloat16)
        behind = (torch.arange(3)[:, None] >= torch.tensor(lengths))[..., None]
        clean = _with_gradients("lstm", leaves, lengths=torch.tensor(lengths))
        leaves["input"] = leaves["input"].masked_fill(behind, float("nan"))
        for actual, expected in zip(_with_gradients("lstm", leaves, lengths=torch.tensor(lengths)), clean, strict=True):
            assert testing.bits_equal(actual, expected)
        assert clean[0].masked_select(behind.expand_as(clean[0])).eq(0).all()


def test_empty_sizes():
    with emulation_support.cuda_serves_the_cpu():
        for steps, batch in ((0, 3), (3, 0)):
            leaves = layer_inputs("lstm", steps, batch, 5, 20, torch.bfloat16)
            output, h_n, c_n = functional.lstm(**leaves, backend="cuda")
            assert output.shape == (steps, batch, 20)
            assert testing.bits_equal(h_n, leaves["h0"]) and testing.bits_equal(c_n, leaves["c0"])
            assert [gradient.shape for gradient in _with_gradients("lstm", leaves)[1:]] == [
                leaf.shape for leaf in leaves.values()
            ]


# Faults by file of csrc/cuda/recurrent: what is replaced, by what where PLANTED, and what the report says of it; None
# where every access is in order and only the result is wrong.
FAULTS: dict[str, tuple[str, str, str, str | None]] = {
    "dropped release": (
        "forward", "if (last) mail.publish", "if (last && !PLANTED) mail.publish", "deadlock",
    ),
    "dropped release of the backward": (
        "backward", "if (last) mail.publish", "if (last && !PLANTED) mail.publish", "deadlock",
    ),
    "first states not published": (
        "forward", "mail.publish(group, 1);", "if (!PLANTED) mail.publish(group, 1);", "deadlock",
    ),
    "stale epoch": ("forward", "mail.wait(epoch);", "mail.wait(epoch - PLANTED);", "race"),
    "no wait": ("backward", "mail.wait(epoch);", "if (!PLANTED) mail.wait(epoch);", "race"),
    "published before the barrier": (
        "forward", "unit.hand_on_next(mail, step);",
        "unit.hand_on_next(mail, step); if (PLANTED && last) mail.publish(group, epoch + 1);", "race",
    ),
    "sums read too early": (
        "forward", "__syncthreads();\n      const bool takes", "if (!PLANTED) __syncthreads();\n      const bool takes",
        "reads 4 bytes",
    ),
    "sums overwritten too early": (
        "forward", "__syncthreads();\n      if (last", "if (!PLANTED) __syncthreads();\n      if (last", "race",
    ),
    "columns of another set of blocks": (
        "walk", "exists(column < end)", "exists(column < (PLANTED ? params.batch : end))", "race",
    ),
    "one buffer": ("walk", "epoch % 2 *", "(PLANTED ? 0 : epoch % 2) *", "race"),
    "lanes do not meet": ("walk", "__syncwarp();", "if (!PLANTED) __syncwarp();", "race"),
    "some groups not waited for": (
        "walk", "if (group < groups_) wait", "if (group < groups_ - PLANTED) wait", "race",
    ),
    "words not cleared": (
        "plan", "exchange_bytes + words_bytes),", "exchange_bytes + (PLANTED ? 0 : words_bytes)),",
        "nothing has written",
    ),
    "columns not cleared": (
        "plan", "cudaMemsetAsync(workspace,", "cudaMemsetAsync(PLANTED ? exchange.words : workspace,",
        "nothing has written",
    ),
    "gates in another order": ("forward", "saved[1] * state_", "saved[PLANTED ? 0 : 1] * state_", None),
    "rows in another order": (
        "product", "half / Rows * 8 + lane_ / 4", "half / Rows * 8 + (lane_ / 4 ^ PLANTED)", None,
    ),
    "columns in another order": (
        "product", "stride + lane_ % 4 * 8", "stride + (lane_ % 4 ^ PLANTED) * 8", None,
    ),
    "sums of a warp left out": (
        "product", "min(blocks_, recurrent_warps);", "min(blocks_, recurrent_warps) - PLANTED;", None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def mutant(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every fault in one library, whose variable ``planted`` holds the number of the one that acts."""
    root = tmp_path_factory.mktemp("mutant")
    shutil.copytree(toolchain.source_root() / "cuda" / "recurrent", root / "recurrent")
    for number, (file, before, after, _) in enumerate(FAULTS.values(), 1):
        path = root / "recurrent" / f"recurrent_{file}.cuh"
        text = path.read_text()
        assert text.count(before) == 1, before
        path.write_text(text.replace(before, after.replace("PLANTED", f"(planted == {number})")))
    path = root / "recurrent" / "recurrent_product.cuh"
    path.write_text(path.read_text().replace("#pragma once", '#pragma once\nextern "C" int planted;'))
    library = emulation_support.compile_for_emulator(
        NATIVE / "recurrent_mutant.cu", root / "mutant.so", [root / "recurrent"]
    )
    library.workspace_bytes.restype = ctypes.c_int64
    return library


STEPS, BATCH, HIDDEN = 3, 9, 40


@functools.cache
def _oracle() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Operands of an LSTM without biases, and its results by the plain formula."""
    leaves = layer_inputs("lstm", STEPS, BATCH, 4 * HIDDEN, HIDDEN, torch.bfloat16)
    operands = {name: leaves[name] for name in ("h0", "c0", "weight_hh")}
    # The kernel's input is the product; the identity makes it the layer's.
    operands["from_input"] = leaves["input"]
    wide = {name: tensor.double().requires_grad_() for name, tensor in operands.items()}
    output, h_n, c_n = functional.lstm(
        wide["from_input"], wide["h0"], wide["c0"], torch.eye(4 * HIDDEN, dtype=torch.float64), wide["weight_hh"]
    )
    grads = torch.autograd.grad(output.sum(), [wide[name] for name in ("h0", "c0", "from_input")])
    names = ("grad_h0", "grad_c0", "grad_gates")
    results = {"output": output, "h_n": h_n, "c_n": c_n, **dict(zip(names, grads, strict=True))}
    return operands, {name: tensor.detach() for name, tensor in results.items()}


def _run(library: ctypes.CDLL, number: int, seed: int) -> tuple[str, bool]:
    """What the emulator reports, and whether the results are those of the formula."""
    ctypes.c_int.in_dll(library, "planted").value = number
    operands, expected = _oracle()
    operands = {
        **operands,
        "transposed": operands["weight_hh"].T.contiguous(),
        "ones": torch.ones(STEPS, BATCH, HIDDEN),
    }
    operands["ones"] = operands["ones"].bfloat16()
    results = {name: torch.full_like(tensor, float("nan"), dtype=torch.bfloat16) for name, tensor in expected.items()}
    results["gates"] = torch.full((STEPS, BATCH, 4 * HIDDEN), float("nan"), dtype=torch.bfloat16)
    results["cells"] = torch.full((STEPS, BATCH, HIDDEN), float("nan"))
    sizes = [ctypes.c_int64(size) for size in (STEPS, BATCH, HIDDEN)]
    tensors = operands | results
    calls = {
        "forward": ("from_input", "h0", "c0", "weight_hh", "output", "h_n", "c_n", "gates", "cells"),
        "backward": ("ones", "output", "gates", "cells", "h0", "c0", "transposed", "grad_h0", "grad_c0", "grad_gates"),
    }
    emulation_support.set_seed(seed)
    with (
        emulation_support.buffers(**operands, writable=False),
        emulation_support.buffers(**results, written=False),
    ):
        for name, arguments in calls.items():
            workspace = torch.full((library.workspace_bytes(*sizes[1:]),), 255, dtype=torch.uint8)
            with emulation_support.buffers(workspace=workspace, written=False):
                pointers = [ctypes.c_void_p(tensors[argument].data_ptr()) for argument in arguments]
                error = getattr(library, name)(*pointers, ctypes.c_void_p(workspace.data_ptr()), *sizes)
            assert error in (0, LAUNCH_FAILURE)
            if error != 0:
                return emulation_support.report(), False
    return "", all(testing.error_in_u(results[name], expected[name]) < 3.0 for name in expected)


@pytest.mark.parametrize("multiprocessors", [10, 2])
def test_the_kernels_without_a_fault_pass(mutant, multiprocessors):
    emulation_support.set_multiprocessors(multiprocessors)
    for seed in range(1, 6):
        assert _run(mutant, 0, seed) == ("", True)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(mutant, name):
    emulation_support.set_multiprocessors(10)
    expected = FAULTS[name][3]
    for seed in (1, 2):
        report, right = _run(mutant, list(FAULTS).index(name) + 1, seed)
        assert not right
        assert report == "" if expected is None else expected in report
