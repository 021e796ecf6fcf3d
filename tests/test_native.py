"""Building, caching and loading the compiled libraries, each failure a user can meet included."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fusewright_kernels import build_cache, native, toolchain

ROOT = Path(__file__).resolve().parents[1]

# Builds a tiny library through the real cache: one source, the machine's own compiler.
SMALL_RECIPE = """
    import sys
    from pathlib import Path
    from fusewright_kernels import build_cache, toolchain
    from fusewright_kernels.toolchain import Compilation, Recipe

    def small():
        compiler = toolchain.cxx_compiler()
        source = toolchain.source_root() / "small" / "small.cpp"
        step = Compilation(source, "small.o", (compiler, "-fPIC"))
        return Recipe("small", "libsmall.so", "test", (step,), (compiler, "-shared"), ("small",))

    toolchain.LIBRARIES["small"] = small
    toolchain.source_root = lambda: Path(sys.argv[1])
"""


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(SMALL_RECIPE) + textwrap.dedent(code), *map(str, arguments)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FUSEWRIGHT_")}
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, check=False)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc" / "small"
    folder.mkdir(parents=True)
    (folder / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    return folder.parent


def test_two_processes_that_build_at_once_share_one_result(sources: Path, tmp_path: Path) -> None:
    code = textwrap.dedent(SMALL_RECIPE) + 'print(build_cache.path_of("small"))'
    environment = {**os.environ, "FUSEWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(sources)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(3)]
    results = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, _, code in results] == [0, 0, 0], results
    assert len({output for output, _, _ in results}) == 1
    assert sum("compiling" in errors for _, errors, _ in results) == 1, "the library was built more than once"


def test_a_hit_starts_no_compiler(sources: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    code = 'print(build_cache.path_of("small"))'
    first = run_python(code, sources, FUSEWRIGHT_CACHE_DIR=cache)
    second = run_python("build_cache._run_ninja = None\n" + code, sources, FUSEWRIGHT_CACHE_DIR=cache)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    assert "compiling" not in second.stderr


def test_an_edit_gets_a_file_of_its_own(sources: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    code = 'import ctypes; print(ctypes.CDLL(str(build_cache.path_of("small"))).answer())'
    assert run_python(code, sources, FUSEWRIGHT_CACHE_DIR=cache).stdout == "42\n"
    (sources / "small" / "small.cpp").write_text('extern "C" int answer() { return 43; }\n')
    assert run_python(code, sources, FUSEWRIGHT_CACHE_DIR=cache).stdout == "43\n"


def test_broken_source_shows_diagnostic_command_log_and_hint(sources: Path, tmp_path: Path) -> None:
    (sources / "small" / "small.cpp").write_text("int broken( { return 1; }\n")
    result = run_python('build_cache.path_of("small")', sources, FUSEWRIGHT_CACHE_DIR=str(tmp_path / "cache"))
    message = result.stderr[result.stderr.index("BuildError: ") :]
    assert "small.cpp:1:" in message and "error:" in message
    assert "command: " in message and "small.cpp" in message
    assert "hint: " in message
    log = Path(message.split("log: ")[1].splitlines()[0])
    assert "small.cpp:1:" in log.read_text()


def test_a_failed_build_leaves_no_library(sources: Path, tmp_path: Path) -> None:
    (sources / "small" / "small.cpp").write_text("int broken( { return 1; }\n")
    run_python('build_cache.path_of("small")', sources, FUSEWRIGHT_CACHE_DIR=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("small-*/*"))


def test_missing_compiler_is_named(sources: Path, tmp_path: Path) -> None:
    result = run_python(
        'build_cache.path_of("small")', sources, FUSEWRIGHT_CACHE_DIR=str(tmp_path / "cache"), CXX="no-such-compiler"
    )
    assert "no C++ compiler found (no-such-compiler)" in result.stderr


def test_without_a_compiler_calls_run_as_plain_pytorch_with_one_warning(tmp_path: Path) -> None:
    code = """
        import warnings, torch
        from fusewright import functional
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                functional.layer_norm(torch.ones(2, 8), 8)
                functional.layer_norm(torch.ones(2, 8, dtype=torch.float64), 8)
        print(len(caught), caught[0].message)
    """
    result = run_python(
        code, ".", FUSEWRIGHT_CACHE_DIR=str(tmp_path / "cache"), CXX="no-such-compiler", TRITON_INTERPRET="0"
    )
    assert result.stdout.startswith("1 norm runs as plain PyTorch."), result.stderr
    assert "no C++ compiler found" in result.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="switches to another user to meet a home it cannot write")
def test_read_only_home_falls_back_to_the_temporary_folder(sources: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    temporary.chmod(0o777)
    # Root writes anywhere, so the check itself runs as the user nobody, in the child that holds nothing else.
    code = "import os; os.setuid(65534); print(build_cache.directory())"
    result = run_python(code, sources, HOME=str(home), XDG_CACHE_HOME=str(home), TMPDIR=str(temporary))
    assert result.stdout.startswith(str(temporary)), result.stderr
    assert "cannot be written" in result.stderr


def test_the_fingerprint_ignores_where_the_installation_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = build_cache.fingerprint(toolchain.LIBRARIES["cpu"]())
    copy = tmp_path / "elsewhere" / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    monkeypatch.setattr(toolchain, "source_root", lambda: copy)
    assert build_cache.fingerprint(toolchain.LIBRARIES["cpu"]()) == here


def test_sanitized_libraries_have_a_file_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build_cache.fingerprint(toolchain.LIBRARIES["cpu"]())
    monkeypatch.setenv("FUSEWRIGHT_SANITIZER", "address")
    assert build_cache.fingerprint(toolchain.LIBRARIES["cpu"]()) != plain


def test_an_unknown_instruction_set_is_refused() -> None:
    result = run_python(
        "from fusewright_kernels import native; native.cpu_unavailable_reason()", ".", FUSEWRIGHT_CPU_ISA="mmx"
    )
    assert "FUSEWRIGHT_CPU_ISA is 'mmx', expected one of amx" in result.stderr


def test_host_module_knows_this_machine() -> None:
    host = native.host()
    assert host.isas() == native.cpu_isas()
    assert host.usable_processors() == len(os.sched_getaffinity(0))
    assert host.cache_sizes()["line"] in (32, 64, 128, 0)


def test_probes_give_rates_and_refuse_nonsense() -> None:
    host = native.host()
    assert host.copy_bandwidth(1 << 20, 1) > 0.1
    assert host.read_bandwidth(1 << 20, 1) > 0.1
    assert host.fma_peak(1) > 0.1
    assert host.exp_peak(1) > 0.01 and host.exp_peak(1, two_bytes=True) > 0.01
    assert host.amx_peak(1) >= 0.0
    with pytest.raises(ValueError, match="threads is 0, expected at least 1"):
        host.copy_bandwidth(1 << 20, 0)
    with pytest.raises(ValueError, match="bytes is 0, expected at least 1"):
        host.read_bandwidth(0)
    with pytest.raises(ValueError, match="isa is 'mmx'"):
        host.fma_peak(1, "mmx")


def test_no_instruction_set_shares_a_weak_symbol_with_another() -> None:
    """The linker keeps one copy of a weak symbol; outside the namespaces of an instruction set it could be any."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm, of binutils, is not installed")
    listing = subprocess.run([nm, "-C", str(build_cache.path_of("cpu"))], capture_output=True, text=True, check=True)
    weak = [line for line in listing.stdout.splitlines() if line[17:18] in ("W", "V", "u")]
    assert not [line for line in weak if not any(f"fusewright::{isa}::" in line for isa in toolchain.CPU_ISAS)]
