"""The one-way rule: benchmarks and tests -> engine -> an op's op.py -> its backends and reference -> shared files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels/fusewright_kernels"
ENGINE = ROOT / "engine/fusewright"
OPS = sorted(folder.name for folder in KERNELS.iterdir() if (folder / "op.py").exists())


def imports_of(path: Path) -> Iterator[str]:
    """Every module that ``path`` imports, ``from package import module`` as ``package.module``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def op_of(module: str) -> str | None:
    """The op folder below which ``module`` lies, if it does."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fusewright_kernels" and len(parts) > 1 and parts[1] in OPS else None


def test_the_ops_are_found() -> None:
    assert {"normalization", "softmax"} <= set(OPS)


def test_kernels_never_import_the_engine_or_the_benchmarks() -> None:
    for path in python_files(KERNELS):
        for module in imports_of(path):
            assert module.split(".")[0] not in ("fusewright", "fusewright_bench"), f"{path} imports {module}"


def test_engine_never_imports_the_benchmarks() -> None:
    for path in python_files(ENGINE):
        for module in imports_of(path):
            assert module.split(".")[0] != "fusewright_bench", f"{path} imports {module}"


def test_engine_reaches_an_op_through_op_py_only() -> None:
    for path in python_files(ENGINE):
        # The numerics API measures against the oracle, which is the op's reference.
        allowed = ("op", "reference") if (ENGINE / "testing") in path.parents else ("op",)
        for module in imports_of(path):
            if op_of(module):
                assert module.split(".")[2] in allowed, f"{path} imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_reaches_another_through_op_py_only(op: str) -> None:
    for path in python_files(KERNELS / op):
        for module in imports_of(path):
            other = op_of(module)
            if other and other != op:
                assert module.split(".")[2] == "op", f"{path} imports {module}"


def test_shared_files_import_no_op() -> None:
    for path in KERNELS.glob("*.py"):
        if path.stem.endswith("compile_check"):  # programs over all ops
            continue
        for module in imports_of(path):
            assert op_of(module) is None, f"{path} imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_reference_imports_only_torch(op: str) -> None:
    modules = {module.split(".")[0] for module in imports_of(KERNELS / op / "reference.py")}
    assert modules <= {"torch", "math", "collections", "typing"}


@pytest.mark.parametrize("op", OPS)
def test_backends_never_import_their_op(op: str) -> None:
    for path in (KERNELS / op).glob("backend_*.py"):
        for module in imports_of(path):
            assert not module.endswith(f"{op}.op"), f"{path} imports {module}"


def test_native_sources_keep_torch_out_of_kernels() -> None:
    for folder in ("include", "cpu", "cuda", "host"):
        for path in (ROOT / "csrc" / folder).rglob("*.*"):
            assert "#include <torch" not in path.read_text(), f"{path} includes a torch header"


def test_cpu_kernels_include_no_standard_template() -> None:
    """A standard template compiled for AVX-512 could be the one copy the linker keeps for every instruction set."""
    allowed = {"stdint.h", "string.h", "stdlib.h", "math.h", "immintrin.h", "cstdint", "unistd.h", "sys/syscall.h"}
    paths = [*(ROOT / "csrc/include/fusewright/cpu").glob("*.h"), *(ROOT / "csrc/cpu").glob("*.cpp")]
    for path in paths:
        if path.name == "select.cpp":  # compiled for the baseline only
            continue
        for line in path.read_text().splitlines():
            if line.startswith("#include <"):
                assert line[len("#include <") : -1] in allowed, f"{path}: {line}"
