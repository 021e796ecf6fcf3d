"""How each library is compiled: compilers, flags, sources. Where the results are kept is ``build_cache``'s concern."""

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

# The oldest torch whose stable ABI the ops libraries use; they load in every later one.
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"

# One table of CPU kernels each, best first; csrc/include/fusewright/cpu/isa.h says what a machine must have.
_X86_ISA_FLAGS = {
    "amx": ("-march=sapphirerapids",),
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "generic": ("-march=x86-64-v2",),
    # AMX's tiles as plain loops, only ever chosen by name: tests on any AVX-512 machine run the blocking that only few
    # machines have tiles for.
    "amx_model": ("-march=x86-64-v4", "-mavx512bf16", "-DFUSEWRIGHT_TILE_MODEL"),
}
CPU_ISAS = tuple(_X86_ISA_FLAGS)

# No -ffast-math: linking with it changes the floating-point mode of the whole process.
# GCC 12 warns of uninitialised variables inside its own AVX-512 headers, hence the two exceptions.
_CXX_FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
)  # fmt: skip

# Says that the sources named *_sm90 are part of the CUDA library: they use instructions of Hopper alone.
_SM90 = ("-DFUSEWRIGHT_CUDA_SM90",)

# -O1, the later of two: at -O3 the checks in inlined vector code take a compiler more than ten minutes a source. Alone
# it fuses no multiplication with an addition (one of g++'s "expensive" optimizations), and so rounds otherwise.
SANITIZER_FLAGS = {
    "address": (
        "-O1", "-fexpensive-optimizations", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}  # fmt: skip


class ToolchainError(RuntimeError):
    """A compiler is missing, or a library has no meaning on this machine."""


@dataclass(frozen=True)
class Compilation:
    """One source to one object."""

    source: Path
    object_name: str
    command: tuple[str, ...]  # without source, output and dependency file


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a library's bits but the contents of its sources."""

    name: str
    filename: str
    compiler_identity: str
    compilations: tuple[Compilation, ...]
    link: tuple[str, ...]  # command and flags; objects and output are added
    source_folders: tuple[str, ...]  # below csrc, hashed whole
    depends_on: tuple[str, ...] = ()


def source_root() -> Path:
    """The folder csrc: package data of an installation, or the checkout's."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "csrc"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def cxx_compiler() -> str:
    """The C++ compiler: ``CXX``, else g++, else clang++.

    Raises:
        ToolchainError: there is none.
    """
    forced = os.environ.get("CXX")
    for candidate in (forced,) if forced else ("g++", "clang++"):
        found = shutil.which(candidate)
        if found:
            return found
    raise ToolchainError(f"no C++ compiler found ({forced or 'g++, clang++'}): install one or set CXX")


@functools.cache
def nvcc_compiler() -> str:
    """nvcc: ``FUSEWRIGHT_NVCC``, else that of ``CUDA_HOME``, of ``PATH``, of the PyPI packages of CUDA 13.

    Raises:
        ToolchainError: there is none.
    """
    candidates: list[str | None] = [os.environ.get("FUSEWRIGHT_NVCC")]
    if candidates[0] is None:
        home = os.environ.get("CUDA_HOME")
        candidates = [f"{home}/bin/nvcc" if home else None, "nvcc"]
        wheel = importlib.util.find_spec("nvidia")
        if wheel is not None and wheel.submodule_search_locations:
            candidates += [f"{folder}/cu13/bin/nvcc" for folder in wheel.submodule_search_locations]
    for candidate in candidates:
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise ToolchainError("no nvcc found: set FUSEWRIGHT_NVCC or CUDA_HOME, or install nvidia-cuda-nvcc")


@functools.cache
def _identity(compiler: str) -> str:
    return _run(compiler, "--version").strip()


def _sanitizer_flags() -> tuple[str, ...]:
    sanitizer = os.environ.get("FUSEWRIGHT_SANITIZER")
    return SANITIZER_FLAGS[sanitizer] if sanitizer else ()


def _include() -> tuple[str, ...]:
    return ("-I", str(source_root() / "include"))


def _cpu_isa_flags() -> dict[str, tuple[str, ...]]:
    """Compiler flags of each instruction set to build for.

    ``FUSEWRIGHT_CPU_ISAS="avx512_bf16;avx2"`` names a few, for quick turns while a kernel is being written.
    """
    if platform.machine() != "x86_64":
        return {"generic": ()}
    wanted = os.environ.get("FUSEWRIGHT_CPU_ISAS")
    names = wanted.split(";") if wanted else list(_X86_ISA_FLAGS)
    unknown = set(names) - set(_X86_ISA_FLAGS)
    if unknown:
        raise ToolchainError(f"FUSEWRIGHT_CPU_ISAS is {wanted!r}, expected some of {';'.join(_X86_ISA_FLAGS)}")
    return {name: flags for name, flags in _X86_ISA_FLAGS.items() if name in names}


def _isa_list(isa_flags: dict[str, tuple[str, ...]]) -> str:
    """The macro by which sources that serve every instruction set name them all."""
    return f"-DFUSEWRIGHT_FOR_EACH_ISA(MACRO)={' '.join(f'MACRO({isa})' for isa in isa_flags)}"


def _baseline_flags() -> tuple[str, ...]:
    return _X86_ISA_FLAGS["generic"] if platform.machine() == "x86_64" else ()


def _cpu() -> Recipe:
    compiler = cxx_compiler()
    base = (compiler, *_CXX_FLAGS, *_sanitizer_flags(), *_include())
    folder = source_root() / "cpu"
    isa_flags = _cpu_isa_flags()
    compilations = [
        Compilation(source, f"{source.stem}.{isa}.o", (*base, *flags, f"-DFUSEWRIGHT_ISA={isa}"))
        for source in sorted(folder.glob("*.cpp"))
        if source.stem != "select"
        for isa, flags in isa_flags.items()
    ]
    select_command = (*base, *_baseline_flags(), _isa_list(isa_flags))
    compilations.append(Compilation(folder / "select.cpp", "select.o", select_command))
    link = (compiler, "-shared", "-Wl,-soname,libfusewright_cpu.so", *_sanitizer_flags())
    return Recipe(
        "cpu", "libfusewright_cpu.so", _identity(compiler), tuple(compilations), link, ("cpu", "include"),
    )  # fmt: skip


def cuda_architectures() -> list[str]:
    """Targets of the CUDA kernels, as in ``FUSEWRIGHT_CUDA_ARCHS="80;90a"``, the default."""
    return os.environ.get("FUSEWRIGHT_CUDA_ARCHS", "80;90a").split(";")


def _cuda() -> Recipe:
    compiler = nvcc_compiler()
    architectures = cuda_architectures()
    hopper = [arch for arch in architectures if arch == "90a"]
    flags = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static")
    command = (compiler, *flags, "--resource-usage", *(_SM90 if hopper else ()), *_include())
    compilations = []
    for source in sorted((source_root() / "cuda").rglob("*.cu")):
        targets = hopper if source.stem.endswith("_sm90") else architectures
        if targets:
            compilations.append(Compilation(source, f"{source.stem}.o", (*command, *_code_for(targets))))
    link = (compiler, *flags, *_code_for(architectures), "-shared", "-Xlinker", "-soname,libfusewright_cuda.so")
    return Recipe("cuda", "libfusewright_cuda.so", _identity(compiler), tuple(compilations), link, ("cuda", "include"))


def _code_for(architectures: list[str]) -> list[str]:
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]


def _torch_folder() -> Path:
    # Found without importing torch's extension machinery, which insists on a CUDA build of torch for CUDA sources.
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        raise ToolchainError("torch is not installed")
    return Path(next(iter(torch.submodule_search_locations)))


def _link_torch() -> tuple[str, ...]:
    # libtorch.so pulls in the parts a build of torch has; Python loads them with local symbols, so it must be named.
    return ("-L", str(_torch_folder() / "lib"), "-Wl,--no-as-needed", "-ltorch")


def _torch_command() -> tuple[str, ...]:
    return (cxx_compiler(), *_CXX_FLAGS, *_sanitizer_flags(), "-isystem", str(_torch_folder() / "include"), *_include())


def _ops(device: str) -> Recipe:
    compiler = cxx_compiler()
    folder = source_root() / "ops"
    command = (*_torch_command(), _STABLE_ABI)
    compilations = tuple(
        Compilation(source, f"{source.stem}.o", command) for source in sorted(folder.glob(f"*_{device}.cpp"))
    )
    link = (compiler, "-shared", *_sanitizer_flags(), *_link_torch())
    name = f"ops_{device}"
    return Recipe(
        name, f"libfusewright_{name}.so", _identity(compiler), compilations, link, ("ops", "include"), (device,),
    )  # fmt: skip


def _host() -> Recipe:
    import pybind11

    compiler = cxx_compiler()
    command = (
        compiler, *_CXX_FLAGS, "-pthread", "-isystem", pybind11.get_include(),
        "-isystem", sysconfig.get_paths()["include"], *_include(),
    )  # fmt: skip
    folder = source_root() / "host"
    isa_flags = _cpu_isa_flags()
    # Probes use the widest registers of the instruction set they name, so each is compiled for its own.
    host_command = (*command, *_baseline_flags(), _isa_list(isa_flags))
    compilations = [Compilation(folder / "host.cpp", "host.o", host_command)]
    compilations += [
        Compilation(folder / "probe.cpp", f"probe.{isa}.o", (*command, *flags, f"-DFUSEWRIGHT_ISA={isa}"))
        for isa, flags in isa_flags.items()
    ]
    filename = f"fusewright_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = (compiler, "-shared", "-pthread")
    return Recipe("host", filename, _identity(compiler), tuple(compilations), link, ("host", "include"))


def emulated_cuda_command() -> tuple[str, ...]:
    """Compiles a CUDA source as C++ for the emulator, which is told of every load and store by the compiler's
    instrumentation for ThreadSanitizer. Its library is not linked. Symbols stay visible: reports name kernels by them.

    Raises:
        ToolchainError: the compiler is not GCC; others instrument by other calls.
    """
    folder = source_root() / "emulation"
    if "Free Software Foundation" not in _identity(cxx_compiler()):
        raise ToolchainError(f"the emulator of CUDA needs g++, {cxx_compiler()} is another compiler")
    # nvcc fuses multiplications and additions; so do the results here where the processor can.
    fused = ("-mfma",) if platform.machine() == "x86_64" and " fma " in Path("/proc/cpuinfo").read_text() else ()
    return (
        cxx_compiler(), "-std=c++20", "-O2", "-g1", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", *fused, "-Wall",
        "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-fsanitize=thread", *_SM90,
        "-I", str(folder / "include"), *_include(), "-x", "c++",
    )  # fmt: skip


def _emulator() -> Recipe:
    compiler = cxx_compiler()
    folder = source_root() / "emulation"
    command = (
        compiler,
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-I",
        str(folder),
        "-I",
        str(folder / "include"),
    )
    compilations = tuple(Compilation(source, f"{source.stem}.o", command) for source in sorted(folder.glob("*.cpp")))
    link = (compiler, "-shared", "-Wl,-soname,libfusewright_emulator.so")
    return Recipe("emulator", "libfusewright_emulator.so", _identity(compiler), compilations, link, ("emulation",))


def _cuda_emulated() -> Recipe:
    compiler = cxx_compiler()
    root = source_root()
    sources = [(source, emulated_cuda_command()) for source in sorted((root / "cuda").rglob("*.cu"))]
    # The CUDA ops as they are, attached for tensors on the CPU.
    sources += [
        (source, (*_torch_command(), _STABLE_ABI, "-DFUSEWRIGHT_CUDA_KEY=CPU"))
        for source in sorted((root / "ops").glob("*_cuda.cpp"))
    ]
    stand_in_command = (*_torch_command(), "-I", str(root / "emulation"))
    sources += [(source, stand_in_command) for source in sorted((root / "emulation" / "torch").glob("*.cpp"))]
    compilations = tuple(Compilation(source, f"{source.stem}.o", command) for source, command in sources)
    # Symbolic: functions of torch that the library stands in for, and kernels of the real CUDA library, have the names
    # of its own.
    link = (compiler, "-shared", "-Wl,-Bsymbolic", *_link_torch())
    return Recipe(
        "cuda_emulated", "libfusewright_cuda_emulated.so", _identity(compiler), compilations, link,
        ("cuda", "emulation", "include", "ops"), ("emulator",),
    )  # fmt: skip


LIBRARIES: dict[str, Callable[[], Recipe]] = {
    "cpu": _cpu,
    "ops_cpu": lambda: _ops("cpu"),
    "host": _host,
    "cuda": _cuda,
    "ops_cuda": lambda: _ops("cuda"),
    "emulator": _emulator,
    "cuda_emulated": _cuda_emulated,
}
# Built when a test asks for them.
TEST_LIBRARIES = ("emulator", "cuda_emulated")
