"""Which backend serves a call, what is said about the others, and how a choice is forced."""

import os
import subprocess
import sys

import pytest
import torch

import fusewright
from fusewright import functional
from fusewright.diagnostics import doctor_main, explain_main
from fusewright_kernels import dispatch, native


def test_explain_names_the_kernel_and_refuses_the_others_with_a_reason() -> None:
    rows = fusewright.explain(functional.layer_norm, torch.ones(2, 8), 8)
    assert [row.serves for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[-1].backend == "cpu" and native.cpu_isa() in rows[-1].reason
    assert rows[0].backend == "cuda" and rows[0].reason == "tensors are on cpu"
    assert "cpu" in str(rows) and "serves" in str(rows)


def test_explain_covers_every_op_in_a_function() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return functional.softmax(functional.rms_norm(x, 8))

    rows = fusewright.explain(block, torch.ones(2, 8))
    assert [row.op for row in rows if row.serves] == ["norm", "softmax"]


def test_float64_belongs_to_the_reference_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    rows = fusewright.explain(functional.layer_norm, torch.ones(2, 8, dtype=torch.float64), 8)
    assert rows[-1].backend == "reference" and rows[-1].reason == "float64 and meta tensors by design"
    assert not recwarn.list


def test_explain_tells_a_forced_choice() -> None:
    rows = fusewright.explain(functional.softmax, torch.ones(2, 8), backend="reference")
    assert [(row.backend, row.reason) for row in rows] == [("reference", "forced by the call or by FUSEWRIGHT_BACKEND")]


def test_a_forced_backend_that_cannot_serve_raises_with_its_reason() -> None:
    message = "backend is 'cuda', expected a backend that can serve norm: tensors are on cpu"
    with pytest.raises(ValueError, match=message):
        functional.layer_norm(torch.ones(2, 8), 8, backend="cuda")


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend is 'tpu', expected one of cuda, triton, cpu, reference"):
        functional.layer_norm(torch.ones(2, 8), 8, backend="tpu")


def test_more_dimensions_than_a_kernel_takes_fall_back_with_one_warning() -> None:
    dispatch.forget()
    x = torch.randn(*[1] * 12, 2, 8)
    with pytest.warns(UserWarning, match="norm runs as plain PyTorch.*14 dimensions") as caught:
        first = functional.layer_norm(x, 8)
        second = functional.layer_norm(x, 8)
    assert len(caught) == 1
    assert torch.equal(first, second)


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_environment_forces_a_backend() -> None:
    code = """
import torch, fusewright
print(fusewright.explain(fusewright.functional.softmax, torch.ones(2, 8))[-1].backend)
"""
    assert in_a_new_process(code, FUSEWRIGHT_BACKEND="reference").stdout == "reference\n"
    assert "FUSEWRIGHT_BACKEND is tpu, expected one of" in in_a_new_process(code, FUSEWRIGHT_BACKEND="tpu").stderr


@pytest.mark.parametrize("isa", native.cpu_isas())
def test_environment_forces_an_instruction_set(isa: str) -> None:
    code = """
import torch, fusewright
from fusewright_kernels import native
fusewright.functional.softmax(torch.ones(2, 8))
print(native.cpu_isa())
"""
    assert in_a_new_process(code, FUSEWRIGHT_CPU_ISA=isa).stdout == f"{isa}\n"


def test_every_instruction_set_can_be_selected_in_one_process() -> None:
    before = native.cpu_isa()
    x = torch.randn(5, 77)
    expected = functional.layer_norm(x.double(), 77)
    try:
        for isa in native.cpu_isas():
            native.select_cpu_isa(isa)
            assert native.cpu_isa() == isa
            torch.testing.assert_close(functional.layer_norm(x, 77).double(), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="isa is 'mmx', expected one of"):
            native.select_cpu_isa("mmx")
    finally:
        native.select_cpu_isa(before)


def test_doctor_passes_its_self_tests(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_main([]) == 0
    output = capsys.readouterr().out
    assert "cpu kernels            ready" in output
    assert "FAILED" not in output


def test_explain_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_main(["softmax", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert "instruction set" in capsys.readouterr().out
