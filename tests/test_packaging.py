"""What an installation holds and what it needs: pure Python, no torch to build, every source on board."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # A copy, as setuptools leaves its build folder beside the sources.
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (result,) = folder.glob("*.whl")
    return result


def test_the_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_carries_every_source_and_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for source in (ROOT / "csrc").rglob("*.*"):
        assert f"fusewright_kernels/csrc/{source.relative_to(ROOT / 'csrc')}" in names
    for root, package in (
        ("engine", "fusewright"),
        ("kernels", "fusewright_kernels"),
        ("benchmarks", "fusewright_bench"),
    ):
        for source in (ROOT / root / package).rglob("*"):
            if source.suffix not in (".py", ".json", ".html", ".css", ".js"):
                continue
            assert str(source.relative_to(ROOT / root)) in names, f"{source} is missing from pyproject's packages"


def test_the_wheel_takes_no_top_level_name_but_its_three(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "fusewright", "fusewright_kernels", "fusewright_bench",
    }  # fmt: skip


def test_an_installed_wheel_finds_its_sources(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from fusewright_kernels import toolchain; print(toolchain.source_root())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)},
        check=True,
    )  # fmt: skip
    assert result.stdout.strip() == str(tmp_path / "fusewright_kernels" / "csrc")


def test_the_import_needs_no_triton_no_compiler_and_builds_nothing(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if not installed
import fusewright, torch
print(fusewright.functional.layer_norm(torch.ones(2, 4, dtype=torch.float64), 4).shape)
"""
    environment = {"PATH": "", "FUSEWRIGHT_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.stdout == "torch.Size([2, 4])\n", result.stderr
    assert not (tmp_path / "cache").exists()


def test_bare_kernels_and_engine_stay_free_for_others() -> None:
    code = "import kernels, sys; sys.exit(0 if getattr(kernels, '__file__', None) is None else 1)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 or "No module named 'kernels'" in result.stderr
