"""Load the compiled libraries, building them on first use.

Five libraries: ``cpu`` and ``cuda`` hold the kernels and know nothing of torch; ``ops_cpu`` and ``ops_cuda`` attach
them to the op schemas through torch's stable ABI, so that one binary serves every supported torch and Python; ``host``
is a pybind11 module of helpers without tensors. ``toolchain`` says how each is compiled, ``build_cache`` where it is
kept; this module loads them and explains in one sentence why one cannot be loaded.
"""

import ctypes
import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

from fusewright_kernels import build_cache
from fusewright_kernels.build_cache import BuildError
from fusewright_kernels.checks import value_error
from fusewright_kernels.toolchain import CPU_ISAS


@functools.cache
def _load_shared(name: str) -> ctypes.CDLL:
    # Global, so that the ops library finds the symbols; its own entry names this library by soname only.
    return ctypes.CDLL(str(build_cache.path_of(name)), mode=ctypes.RTLD_GLOBAL)


def _load_ops(name: str) -> None:
    path = build_cache.path_of(name)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch's message names the path only; the linker's reason is the cause.
        raise BuildError(f"{path} does not load: {error.__cause__ or error}") from error


@functools.cache
def cpu_unavailable_reason() -> str | None:
    """Load the CPU kernels; why they cannot be used, or None."""
    forced = os.environ.get("FUSEWRIGHT_CPU_ISA")
    if forced and forced not in CPU_ISAS:
        raise value_error("FUSEWRIGHT_CPU_ISA", repr(forced), f"one of {', '.join(CPU_ISAS)}")
    products = os.environ.get("FUSEWRIGHT_FLOAT32_PRODUCTS")
    if products not in (None, "", "vectors", "split"):
        raise value_error("FUSEWRIGHT_FLOAT32_PRODUCTS", repr(products), "'vectors' or 'split'")
    try:
        library = _load_shared("cpu")
        _load_ops("ops_cpu")
    except BuildError as error:
        return str(error)
    library.fusewright_cpu_available.restype = ctypes.c_char_p
    library.fusewright_cpu_selected.restype = ctypes.c_char_p
    if not library.fusewright_cpu_selected():
        raise value_error("FUSEWRIGHT_CPU_ISA", repr(forced), f"one that this machine has: {', '.join(cpu_isas())}")
    return None


@functools.cache
def cuda_unavailable_reason() -> str | None:
    """Load the CUDA kernels; why they cannot be used, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the device has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    try:
        _load_shared("cuda")
        _load_ops("ops_cuda")
    except BuildError as error:
        return str(error)
    return None


def cpu_isas() -> list[str]:
    """Instruction sets of the CPU kernels that this machine can run, best first."""
    library = _load_shared("cpu")
    library.fusewright_cpu_available.restype = ctypes.c_char_p
    return library.fusewright_cpu_available().decode().split(",")


def cpu_isa() -> str:
    """The instruction set whose kernels serve calls."""
    library = _load_shared("cpu")
    library.fusewright_cpu_selected.restype = ctypes.c_char_p
    return library.fusewright_cpu_selected().decode()


def select_cpu_isa(isa: str) -> None:
    """Serve calls from the kernels of ``isa`` from now on; not while another thread runs one.

    Raises:
        ValueError: this machine cannot run them.
    """
    if _load_shared("cpu").fusewright_cpu_select(isa.encode()) != 0:
        raise value_error("isa", repr(isa), f"one of {', '.join(cpu_isas())}")


def split_float32_products(split: bool) -> None:
    """Let attention multiply float32 as sums of three bfloat16 from now on, where the CPU has AMX tiles.

    Six products of bfloat16 in place of one keep float32's accuracy; elements below 2^-110 lose digits. Without tiles
    it changes nothing. ``FUSEWRIGHT_FLOAT32_PRODUCTS=split`` does the same for a whole process; not while another
    thread runs a kernel.
    """
    _load_shared("cpu").fusewright_cpu_split_float32(int(split))


@functools.cache
def host() -> ModuleType:
    """The host module: processor features and caches, probes of peak rates.

    Raises:
        BuildError: it cannot be built here.
    """
    path = Path(build_cache.path_of("host"))
    specification = importlib.util.spec_from_file_location("fusewright_host", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
