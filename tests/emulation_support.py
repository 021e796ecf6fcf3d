"""The CUDA emulator in tests: its libraries, its settings, kernels compiled for it, and its reports.

``csrc/emulation/README.md`` says what it models and what it finds.
"""

import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusewright_kernels import build_cache, dispatch, row_kernels, toolchain
from fusewright_kernels.checks import LOW_PRECISION
from fusewright_kernels.cross_entropy import linear_chunks
from fusewright_kernels.dispatch import Call

_DATA_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MOST_DIMENSIONS = 12


def _unavailable_reason() -> str | None:
    try:
        toolchain.emulated_cuda_command()
    except toolchain.ToolchainError as error:
        return str(error)
    return None


needs_emulator = pytest.mark.skipif(_unavailable_reason() is not None, reason=str(_unavailable_reason()))


@functools.cache
def core() -> ctypes.CDLL:
    """The emulator itself, see ``csrc/emulation/control.h``."""
    library = ctypes.CDLL(str(build_cache.path_of("emulator")))
    library.fusewright_emulation_report.restype = ctypes.c_char_p
    return library


@functools.cache
def _kernels() -> ctypes.CDLL:
    core()
    path = build_cache.path_of("cuda_emulated")
    torch.ops.load_library(path)
    # Composed of the op above and of torch's products, in Python, for tensors of CUDA only.
    for name in ("forward", "gradients"):
        composed = partial(getattr(linear_chunks, name), "cuda")
        torch.library.impl(f"fusewright::linear_cross_entropy_{name}.cuda", "cpu", composed)
    return ctypes.CDLL(str(path))


def set_seed(seed: int) -> None:
    """Of every choice of the launches that follow."""
    core().fusewright_emulation_set_seed(ctypes.c_uint64(seed))


def set_multiprocessors(count: int) -> None:
    core().fusewright_emulation_set_multiprocessors(count)


@contextmanager
def generation(major: int) -> Iterator[None]:
    """Inside the block, launches find a device whose compute capability has this major number."""
    core().fusewright_emulation_set_generation(major)
    try:
        yield
    finally:
        core().fusewright_emulation_set_generation(9)


@contextmanager
def clusters_together(count: int) -> Iterator[None]:
    """Inside the block, so many clusters of blocks run at the same time."""
    core().fusewright_emulation_set_clusters_together(count)
    try:
        yield
    finally:
        core().fusewright_emulation_set_clusters_together(1)


def report() -> str:
    """What the last failed launch did wrong."""
    return core().fusewright_emulation_report().decode()


@contextmanager
def device_memory() -> Iterator[None]:
    """Inside the block, torch's new CPU tensors are memory that emulated kernels may access; and no others are."""
    _kernels().fusewright_emulation_use_device_memory(1)
    try:
        yield
    finally:
        _kernels().fusewright_emulation_use_device_memory(0)


def _refuse_rows(call: Call) -> str | None:
    return row_kernels.refuse_unless_on("cpu", call)


def _refuse_float32(call: Call) -> str | None:
    return None if call.device_type == "cpu" and call.dtypes[0] in LOW_PRECISION else "no kernel takes it"


_PREDICATES = {
    **dict.fromkeys(("norm", "softmax", "swiglu", "bias_gelu", "dropout_add", "rotary_embedding"), _refuse_rows),
    **dict.fromkeys(("cross_entropy", "linear_cross_entropy"), _refuse_rows),
    "attention": _refuse_float32,
    "attention_decode": _refuse_float32,
    "recurrent": _refuse_float32,
    "lsh_hash": _refuse_rows,
}


@contextmanager
def cuda_serves_the_cpu() -> Iterator[None]:
    """Inside the block, ``backend="cuda"`` runs the CUDA kernels on CPU tensors, emulated."""
    before = {op: dispatch.predicates(op) for op in _PREDICATES}
    set_seed(0)
    with device_memory():
        for op, backends in before.items():
            dispatch.register(op, {**backends, "cuda": _PREDICATES[op]})
        dispatch.forget()
        try:
            yield
        finally:
            for op, backends in before.items():
                dispatch.register(op, backends)
            dispatch.forget()


def compile_for_emulator(source: Path, target: Path, includes: Sequence[Path] = ()) -> ctypes.CDLL:
    """Compile one CUDA source and load it. ``includes`` come before the project's own."""
    core()
    command = list(toolchain.emulated_cuda_command())
    first = command.index("-I")
    command[first:first] = [part for folder in includes for part in ("-I", str(folder))]
    compiled = target.with_suffix(".o")
    # Linked without the option that asked for instrumentation, as it would bring in the library that it is made for.
    for step in (
        [*command, "-c", str(source), "-o", str(compiled)],
        [
            command[0],
            "-shared",
            "-Wl,-Bsymbolic",
            str(compiled),
            "-o",
            str(target),
            str(build_cache.path_of("emulator")),
        ],
    ):
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(target))


class RowView(ctypes.Structure):
    """``csrc/include/fusewright/row_view.h``"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("outer_dims", ctypes.c_int32),
        ("inner_dims", ctypes.c_int32),
        ("outer_size", ctypes.c_int64 * _MOST_DIMENSIONS),
        ("outer_stride", ctypes.c_int64 * _MOST_DIMENSIONS),
        ("inner_size", ctypes.c_int64 * _MOST_DIMENSIONS),
        ("inner_stride", ctypes.c_int64 * _MOST_DIMENSIONS),
    )


def row_view(tensor: Tensor) -> RowView:
    """A matrix as rows and columns, a vector as one row."""
    view = RowView(data=tensor.data_ptr(), dtype=_DATA_TYPES[tensor.dtype], outer_dims=tensor.ndim - 1, inner_dims=1)
    if tensor.ndim == 2:
        view.outer_size[0], view.outer_stride[0] = tensor.shape[0], tensor.stride(0)
    view.inner_size[0], view.inner_stride[0] = tensor.shape[-1], tensor.stride(-1)
    return view


@contextmanager
def buffers(*, written: bool = True, writable: bool = True, **tensors: Tensor) -> Iterator[None]:
    """Give kernels access to these tensors, by name."""
    for name, tensor in tensors.items():
        bytes_of = ctypes.c_size_t(tensor.untyped_storage().nbytes())
        address = ctypes.c_void_p(tensor.untyped_storage().data_ptr())
        core().fusewright_emulation_add_buffer(name.encode(), address, bytes_of, int(written), int(writable))
    try:
        yield
    finally:
        for tensor in tensors.values():
            core().fusewright_emulation_remove_buffer(ctypes.c_void_p(tensor.untyped_storage().data_ptr()))


def code_of(line: str, library: ctypes.CDLL) -> str:
    """The source line that a report names as ``[library+0x123]``, as ``file.cuh:12``."""
    offset = re.search(r"\+(0x[0-9a-f]+)\]", line)
    assert offset is not None, line
    command = ["addr2line", "-i", "-e", library._name, offset[1]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
