"""The emulator finds planted faults, each under every schedule, and reports nothing where there is none."""

import ctypes
import shutil
from pathlib import Path

import emulation_support
import pytest
import torch

from fusewright_kernels import toolchain

pytestmark = emulation_support.needs_emulator

SEEDS = range(1, 21)
NATIVE = Path(__file__).parent / "native"
LAUNCH_FAILURE = 719

# What the report says of each kernel of emulation_faults.cu.
FAULTS = {
    "missing_barrier": ("reads 4 bytes at byte", "of shared", "Values' (512 bytes)"),
    "missing_second_barrier": ("race with the ", "by thread", "Values' (512 bytes)"),
    "shuffle_for_syncwarp": ("reads 4 bytes", "race with the write by thread"),
    "unwritten_shared": ("thread (50,0,0) of block (0,0,0): reads 4 bytes at byte 308", "nothing has written it"),
    "shared_out_of_range": ("thread (127,0,0)", "byte 512 of shared", "out of range"),
    "global_out_of_range": ("writes 4 bytes", "bytes behind buffer 'output' of 512 bytes"),
    "blocks_race": ("race with a write by another block",),
    "barrier_some_miss": ("deadlock", "warp 1 lanes 0-31: barrier 1, 96 of 128 threads have arrived"),
    "second_arrival": ("second arrival at barrier 2",),
    "barrier_counts_differ": ("barrier 3 for", "others have arrived at it for"),
    "lanes_missing": ("mask 0xffffffff",),
    "missing_proxy_fence": ("a bulk addition", "no fence.proxy.async between", "the write by thread"),
    "overwritten_in_flight": ("race with the",),
    "bytes_differ": (),
    "copy_not_waited_for": ("'dynamic shared memory'",),
    "missing_cluster_barrier": ("reads 4 bytes at byte", "'dynamic shared memory'"),
    "block_ends_early": ("that block has ended",),
}


TWO_BLOCKS = ("blocks_race", "missing_cluster_barrier", "block_ends_early")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulation_support.compile_for_emulator(
        NATIVE / "emulation_faults.cu", tmp_path_factory.mktemp("faults") / "faults.so"
    )


def _run(library: ctypes.CDLL, entry: str, fault: bool, seed: int) -> int:
    output = torch.zeros(256 if entry in TWO_BLOCKS else 128, dtype=torch.int32)
    emulation_support.set_seed(seed)
    with emulation_support.buffers(output=output):
        return getattr(library, entry)(int(fault), ctypes.c_void_p(output.data_ptr()))


@pytest.mark.parametrize("entry", FAULTS)
def test_a_planted_fault_is_found_under_every_schedule(faults, entry):
    for seed in SEEDS:
        assert _run(faults, entry, True, seed) == LAUNCH_FAILURE, f"schedule {seed}"
        report = emulation_support.report()
        assert all(part in report for part in FAULTS[entry]), report


@pytest.mark.parametrize("entry", FAULTS)
def test_nothing_is_found_where_there_is_no_fault(faults, entry):
    for seed in SEEDS:
        assert _run(faults, entry, False, seed) == 0, emulation_support.report()


def test_a_report_leads_to_the_source_line(faults):
    _run(faults, "unwritten_shared", True, 1)
    line = next(
        number
        for number, text in enumerate((NATIVE / "emulation_faults.cu").read_text().splitlines(), 1)
        if "values[threads - 1 - threadIdx.x]" in text
    )
    assert f"emulation_faults.cu:{line}" in emulation_support.code_of(emulation_support.report(), faults)


def test_a_read_only_buffer_is_not_written(faults):
    output = torch.zeros(128, dtype=torch.int32)
    with emulation_support.buffers(output=output, writable=False):
        assert faults.missing_barrier(0, ctypes.c_void_p(output.data_ptr())) == LAUNCH_FAILURE
    assert "the buffer is read-only" in emulation_support.report()


# File below csrc, what is replaced there, by what, the entry that meets it, its width, and what the report says.
MUTATIONS = {
    "reduction without its barrier": (
        "include/fusewright/cuda/reduce.cuh", "__syncthreads();", "", "norm", 4096, "WarpResults",
    ),
    "reduction with one slot": (
        "include/fusewright/cuda/reduce.cuh", "slot_ ^= 1;", "", "norm", 4096, "race",
    ),
    "reduction that reads warps that are not there": (
        "include/fusewright/cuda/reduce.cuh", "lane < warps ?", "lane <= warps ?", "norm", 4096, "nothing has written",
    ),
    "row tile one column too long": (
        "include/fusewright/cuda/row_tile.cuh", "column(vector) < count", "column(vector) <= count", "softmax", 100,
        " buffer '",
    ),
    "staged row read before it is there": (
        "cuda/normalization/normalization_forward.cuh", "staged && pass != first_pass", "staged", "norm", 20000,
        "of shared 'dynamic shared memory' (80000 bytes): nothing has written it",
    ),
    "softmax across without its barrier": (
        "cuda/softmax/softmax_forward.cuh", "__syncthreads();", "", "softmax across", 64, "WarpSums",
    ),
    "lanes of another row named in the mask": (
        "include/fusewright/cuda/reduce.cuh", "Lanes == warp_size ? 0xFFFFFFFFu", "true ? 0xFFFFFFFFu", "softmax", 100,
        "mask 0xffffffff",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["none", *MUTATIONS])
def test_mutations_of_the_real_kernels_are_found(tmp_path, name):
    root = tmp_path / "csrc"
    for folder in ("include", "cuda"):
        shutil.copytree(toolchain.source_root() / folder, root / folder)
    cases = [("norm", 4096), ("softmax", 100), ("norm", 20000), ("softmax across", 64)]
    if name != "none":
        path, before, after, entry, width, expected = MUTATIONS[name]
        text = (root / path).read_text()
        assert before in text
        (root / path).write_text(text.replace(before, after, 1))
        cases = [(entry, width)]
    includes = [root / "include", root / "cuda" / "normalization", root / "cuda" / "softmax"]
    library = emulation_support.compile_for_emulator(NATIVE / "row_kernels_mutant.cu", tmp_path / "mutant.so", includes)
    for entry, width in cases:
        for seed in SEEDS[:5]:
            across = entry.endswith("across")
            input = torch.randn(width, 6).T if across else torch.randn(6, width)
            output = torch.empty_like(input)
            emulation_support.set_seed(seed)
            views = [ctypes.byref(emulation_support.row_view(tensor)) for tensor in (input, output)]
            with (
                emulation_support.buffers(input=input, writable=False),
                emulation_support.buffers(output=output, written=False),
            ):
                error = getattr(library, entry.split()[0])(*views)
            if name == "none":
                assert error == 0, emulation_support.report()
            else:
                assert error == LAUNCH_FAILURE, f"schedule {seed}"
                assert expected in emulation_support.report(), emulation_support.report()


# What is replaced in bias_gelu.cuh, by what, and what the report says.
BIAS_GRADIENT_MUTATIONS = {
    "none": ("", "", ""),
    "sums without their barrier": ("__syncthreads();", "", "RowSums"),
    "chunks that overlap": ("(chunk + 1) * chunk_rows", "(chunk + 2) * chunk_rows", "by another block"),
}


@pytest.mark.parametrize("name", BIAS_GRADIENT_MUTATIONS)
def test_mutations_of_the_bias_gradient_are_found(tmp_path, name):
    root = tmp_path / "csrc"
    for folder in ("include", "cuda/activation", "cuda/normalization"):
        shutil.copytree(toolchain.source_root() / folder, root / folder)
    before, after, expected = BIAS_GRADIENT_MUTATIONS[name]
    path = root / "cuda" / "activation" / "bias_gelu.cuh"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    library = emulation_support.compile_for_emulator(
        NATIVE / "bias_gelu_mutant.cu",
        tmp_path / "mutant.so",
        [root / "include", root / "cuda" / "activation"],
    )
    inputs = {"grad_output": torch.randn(70, 264), "input": torch.randn(70, 264), "bias": torch.randn(264)}
    outputs = {"grad_input": torch.empty(70, 264), "partials": torch.empty(2, 264)}
    for seed in SEEDS[:5]:
        emulation_support.set_seed(seed)
        views = [ctypes.byref(emulation_support.row_view(tensor)) for tensor in (inputs | outputs).values()]
        with (
            emulation_support.buffers(**inputs, writable=False),
            emulation_support.buffers(**outputs, written=False),
        ):
            error = library.bias_gelu_sums(*views)
        if name == "none":
            assert error == 0, emulation_support.report()
        else:
            assert error == LAUNCH_FAILURE, f"schedule {seed}"
            assert expected in emulation_support.report(), emulation_support.report()
