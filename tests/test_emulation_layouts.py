"""Layouts of Hopper's operands, accumulators, descriptors and tensor copies, against CuTe's layout algebra.

What the emulator and the kernels' wrappers agree on could still be wrong for both. CuTe's headers, of the PyPI package
nvidia-cutlass, are an independent word; they are compiled for the host and print where each element lies.
"""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

import emulation_support
import pytest
import torch
from torch import Tensor

from fusewright_kernels import toolchain

NATIVE = Path(__file__).parent / "native"
LAUNCH_FAILURE = 719
CUTLASS = importlib.util.find_spec("cutlass_library")


def _nvcc_missing() -> str | None:
    try:
        toolchain.nvcc_compiler()
    except toolchain.ToolchainError as error:
        return str(error)
    return None


pytestmark = [
    emulation_support.needs_emulator,
    pytest.mark.skipif(CUTLASS is None, reason="no CuTe: pip install --no-deps nvidia-cutlass==4.2.0.0"),
    pytest.mark.skipif(_nvcc_missing() is not None, reason=f"CuTe needs CUDA's headers: {_nvcc_missing()}"),
]


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """CuTe's tables by name."""
    assert CUTLASS is not None and CUTLASS.submodule_search_locations
    include = Path(next(iter(CUTLASS.submodule_search_locations))) / "source" / "include"
    program = tmp_path_factory.mktemp("cute") / "layouts"
    command = [toolchain.nvcc_compiler(), "-std=c++17", "-O0", "-w", "--expt-relaxed-constexpr", "-arch=sm_90a"]
    command += ["-I", str(include), "-x", "cu", str(NATIVE / "cute_layouts.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    # On the host CuTe says that it has no address in shared memory, and takes 0.
    tables = [line.split() for line in lines if not line.startswith("ERROR")]
    return {name: torch.tensor([int(number) for number in numbers]) for name, *numbers in tables}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = emulation_support.compile_for_emulator(
        NATIVE / "layout_probe.cu", tmp_path_factory.mktemp("probe") / "probe.so"
    )
    library.rows_descriptor.restype = library.columns_descriptor.restype = ctypes.c_uint64
    return library


def _random(*shape: int) -> Tensor:
    """Small integers, so that every product and sum is exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def _tile(matrix: Tensor, offsets: Tensor) -> Tensor:
    """A (rows, columns) matrix as a layout places it in a tile of 128 x 128; the rest is NaN."""
    tile = torch.full((128 * 128,), float("nan"), dtype=torch.bfloat16)
    rows, columns = matrix.shape
    tile[offsets.view(128, 128).T[:rows, :columns]] = matrix
    return tile


def _product(entry: object, a: Tensor, b: Tensor, cute: dict[str, Tensor]) -> Tensor:
    registers = torch.full((128 * 64,), float("nan"))
    with emulation_support.buffers(a=a, b=b, writable=False), emulation_support.buffers(d=registers, written=False):
        error = entry(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, registers)))  # type: ignore[operator]
    assert error == 0, emulation_support.report()
    result = torch.empty(64 * 128)
    result[cute["accumulator"]] = registers
    return result.view(128, 64).T


def test_products_of_rows(cute, probe):
    a, b = _random(64, 64), _random(128, 64)
    actual = _product(probe.rows_rows, _tile(a, cute["rows"]), _tile(b, cute["rows"]), cute)
    assert torch.equal(actual, a.float() @ b.float().T)


def test_products_of_registers_and_columns(cute, probe):
    a, b = _random(64, 16), _random(16, 128)
    # CuTe's first index of this operand is the column, so the matrix goes in transposed.
    fragments = a.T.reshape(-1)[cute["operand"]].contiguous()
    actual = _product(probe.registers_columns, fragments, _tile(b.T, cute["columns"]), cute)
    assert torch.equal(actual, a.float() @ b.float())


def test_products_of_a_warp(cute, probe):
    a, b, d = _random(16, 16), _random(16, 8), torch.empty(128)
    registers_a, registers_b = torch.empty(256, dtype=torch.bfloat16), torch.empty(128, dtype=torch.bfloat16)
    with (
        emulation_support.buffers(a=a, b=b, writable=False),
        emulation_support.buffers(registers_a=registers_a, registers_b=registers_b, d=d, written=False),
    ):
        tensors = (a, b, registers_a, registers_b, d)
        error = probe.warp_product(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))
    assert error == 0, emulation_support.report()
    # CuTe counts column by column; of b, the first index is the column of the matrix.
    assert torch.equal(registers_a, a.T.reshape(-1)[cute["warp_a"]])
    assert torch.equal(registers_b, b.reshape(-1)[cute["warp_b"]])
    result = torch.empty(128)
    result[cute["warp_d"]] = d
    assert torch.equal(result.view(8, 16).T, a.float() @ b.float())


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_descriptors(cute, probe, name):
    leading, stride, swizzle = cute[f"{name}_descriptor"].tolist()
    expected = leading << 16 | stride << 32 | swizzle << 62
    assert getattr(probe, f"{name}_descriptor")() == expected


def test_tensor_copies_leave_rows_where_products_expect_them(cute, probe):
    matrix, contents = _random(128, 64), torch.empty(128 * 64, dtype=torch.bfloat16)
    with (
        emulation_support.buffers(matrix=matrix, writable=False),
        emulation_support.buffers(contents=contents, written=False),
    ):
        error = probe.load(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (matrix, contents)))
    assert error == 0, emulation_support.report()
    assert torch.equal(contents, _tile(matrix, cute["rows"])[: 128 * 64])


@pytest.mark.parametrize("rows", [(100, 120), (128, 50), (1, 200)])
def test_tensor_copies_end_with_the_tensor(probe, rows):
    """Rows before the first and behind the last read as 0 and are not written."""
    source, target = _random(rows[0], 64), torch.full((rows[1], 64), float("nan"), dtype=torch.bfloat16)
    expected = target.clone()
    expected[:125] = 0.0
    common = min(*rows, 125)
    expected[:common] = source[:common]
    with (
        emulation_support.buffers(source=source, writable=False),
        emulation_support.buffers(target=target),
    ):
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, target)]
        error = probe.copy(pointers[0], ctypes.c_int64(rows[0]), pointers[1], ctypes.c_int64(rows[1]))
    assert error == 0, emulation_support.report()
    torch.testing.assert_close(target, expected, rtol=0, atol=0, equal_nan=True)


def test_a_multicast_reaches_every_block_once_its_barriers_are_there(probe):
    source, target = _random(128, 64), torch.full((256, 64), float("nan"), dtype=torch.bfloat16)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, target)]
    for seed in range(1, 11):
        emulation_support.set_seed(seed)
        with (
            emulation_support.buffers(source=source, writable=False),
            emulation_support.buffers(target=target, written=False),
        ):
            assert probe.multicast(*pointers, 1) == 0, emulation_support.report()
            assert torch.equal(target, torch.cat((source, source)))
            assert probe.multicast(*pointers, 0) == LAUNCH_FAILURE
        assert "mbarrier" in emulation_support.report()
