"""The CUDA library without a GPU: it builds for every target, no kernel spills, a launch that cannot run says why."""

import ctypes
import re
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from fusewright_kernels import build_cache, cuda_compile_check, toolchain

ENTRIES = (
    "fusewright_cuda_error_string",
    "fusewright_cuda_norm_forward",
    "fusewright_cuda_norm_backward",
    "fusewright_cuda_norm_backward_workspace",
    "fusewright_cuda_softmax_forward",
    "fusewright_cuda_softmax_backward",
    "fusewright_cuda_swiglu_forward",
    "fusewright_cuda_swiglu_backward",
    "fusewright_cuda_dropout_add",
    "fusewright_cuda_rotary",
    "fusewright_cuda_bias_gelu_forward",
    "fusewright_cuda_bias_gelu_backward_workspace",
    "fusewright_cuda_bias_gelu_backward",
    "fusewright_cuda_cross_entropy_forward",
    "fusewright_cuda_cross_entropy_backward",
    "fusewright_cuda_attention_forward",
    "fusewright_cuda_recurrent_forward",
    "fusewright_cuda_recurrent_forward_workspace",
    "fusewright_cuda_recurrent_backward",
    "fusewright_cuda_recurrent_backward_workspace",
    "fusewright_cuda_recurrent_taken_rows",
)


def _nvcc_missing() -> str | None:
    try:
        toolchain.nvcc_compiler()
    except toolchain.ToolchainError as error:
        return str(error)
    return None


needs_nvcc = pytest.mark.skipif(_nvcc_missing() is not None, reason=str(_nvcc_missing()))


@pytest.fixture(scope="module")
def library() -> Path:
    return build_cache.path_of("cuda")


@needs_nvcc
def test_no_kernel_of_any_target_uses_local_memory(library: Path) -> None:
    """Spilled registers and arrays indexed at run time both show as stack or local memory of the machine code."""
    cuobjdump = cuda_compile_check.cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH or beside Triton")
    report = subprocess.run([cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    kernels: dict[str, list[str]] = {}
    offenders = []
    target = name = ""
    for line in report.stdout.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            target = found[1]
        elif found := re.search(r"Function (\w+):", line):
            name = found[1]
        elif found := re.search(r"STACK:(\d+) .*LOCAL:(\d+)", line):
            kernels.setdefault(target, []).append(name)
            if found[1] != "0" or found[2] != "0":
                offenders.append((target, name, line.strip()))
    assert sorted(kernels) == sorted(f"sm_{target}" for target in toolchain.cuda_architectures())
    for_all = {target: {name for name in names if "_sm90_" not in name} for target, names in kernels.items()}
    assert len({frozenset(names) for names in for_all.values()}) == 1, "a target lacks kernels"
    assert not offenders


@needs_nvcc
def test_the_compile_check_reads_both_targets(tmp_path: Path) -> None:
    """On the smallest source; the whole check is ``make compile-check``."""
    compilations = toolchain.LIBRARIES["cuda"]().compilations
    step = next(step for step in compilations if step.source.stem == "normalization_backward_reduce")
    usages = cuda_compile_check.parse(step.source.name, cuda_compile_check.compile_source(step, tmp_path))
    assert sorted(usage.target for usage in usages) == sorted(f"sm_{arch}" for arch in toolchain.cuda_architectures())
    assert all(usage.registers > 0 and usage.spill_bytes == 0 for usage in usages)


def test_the_compile_check_sees_a_spill() -> None:
    report = (
        "ptxas info    : Compiling entry function 'norm_kernel' for 'sm_80'\n"
        "ptxas info    : Function properties for norm_kernel\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 256 bytes smem, 1000 bytes cmem[0]\n"
    )
    (usage,) = cuda_compile_check.parse("norm.cu", report)
    assert (usage.target, usage.registers, usage.stack_bytes, usage.spill_bytes) == ("sm_80", 64, 16, 20)


@needs_nvcc
def test_the_library_loads_without_a_driver(library: Path) -> None:
    loaded = ctypes.CDLL(str(library))
    assert all(hasattr(loaded, entry) for entry in ENTRIES)


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
@pytest.mark.parametrize("entry", ["fusewright_cuda_norm_forward", "fusewright_cuda_softmax_forward"])
def test_a_launch_without_a_device_names_the_cause(library: Path, entry: str) -> None:
    loaded = ctypes.CDLL(str(library))
    loaded.fusewright_cuda_error_string.restype = ctypes.c_char_p
    # Parameters of one row and one column; every operand is absent, and none is reached.
    params = ctypes.create_string_buffer(struct.pack("qq", 1, 1), 8192)
    error = getattr(loaded, entry)(params, None)
    assert error != 0
    assert re.search("driver|no CUDA-capable device", loaded.fusewright_cuda_error_string(error).decode())


@needs_nvcc
def test_nothing_to_do_needs_no_device(library: Path) -> None:
    loaded = ctypes.CDLL(str(library))
    no_rows = ctypes.create_string_buffer(struct.pack("qq", 0, 1), 8192)
    workspace_bytes = ctypes.c_int64(-1)
    assert loaded.fusewright_cuda_norm_forward(no_rows, None) == 0
    assert loaded.fusewright_cuda_softmax_backward(no_rows, None) == 0
    assert loaded.fusewright_cuda_norm_backward_workspace(no_rows, ctypes.byref(workspace_bytes)) == 0
    assert workspace_bytes.value == 0


def test_the_compile_check_counts_hoppers_products() -> None:
    source = "attention_forward_bfloat16_64_sm90"
    code = " HGMMA.64x128x16.F32.BF16 R24, gdesc\n" * 48 + " UTMALDG.4D [UR8], [UR4]\n"
    assert cuda_compile_check.hopper_faults(source, code) == []
    assert cuda_compile_check.hopper_faults(source, " HMMA.16816 R0\n" + code) == ["HMMA 1, expected none"]
    assert cuda_compile_check.hopper_faults(source, "") == ["HGMMA 0, expected 48", "no UTMALDG"]
