"""Instructions that the CPU kernels execute on fixed cases, against the numbers on record: a gate without noise.

Valgrind's callgrind counts one call of each case, Python and torch's dispatch included, and of torch's own function
beside it. It knows no AVX-512, so the AVX2 kernels are counted. Numbers are kept per compiler, which decides them; a
count that grew by more than the tolerance fails, exit code 1. Without valgrind nothing is counted, and the reason told.

``python -m fusewright_bench.studies.instruction_count [--update]``
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fusewright_bench.report import terminal
from fusewright_kernels import toolchain

KEPT = Path(__file__).with_name("instruction_counts.json")
ISA = "avx2"
CASES = {
    "softmax": ("64x1024", ("fwd", "both")),
    "rms_norm": ("64x1024", ("fwd", "both")),
    "add_layer_norm": ("64x1024", ("fwd", "both")),
    "attention": ("1x2x2x128x128x64", ("fwd", "both")),
    "causal_attention": ("1x2x1x130x130x64", ("fwd", "both")),
    "decode_attention": ("1x8x2x1x512x64", ("fwd",)),
    "causal_lsh_attention": ("1x1x512x64x2", ("fwd", "both")),
    "lstm": ("8x4x64x64", ("fwd", "both")),
    "gru": ("8x4x64x64", ("fwd", "both")),
}
_MARKS = """
#include <valgrind/callgrind.h>
extern "C" void start() { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
extern "C" void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""

Counts = dict[str, int]


def absence() -> str | None:
    """Why nothing can be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (apt install valgrind)"
    if not Path("/usr/include/valgrind/callgrind.h").exists():
        return "valgrind's header callgrind.h is not installed"
    return None


def compiler() -> str:
    """The compiler's name and version, without what its distributor adds."""
    text = subprocess.run([toolchain.cxx_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\d+\.\d+", text)
    return f"{'clang' if 'clang' in text else 'g++'} {version.group() if version else 'unknown'}"


def count() -> Counts:
    """Instructions by ``op shape dtype mode provider``, from one process under callgrind."""
    with tempfile.TemporaryDirectory() as folder:
        marks = str(Path(folder) / "marks.so")
        build = [toolchain.cxx_compiler(), "-O1", "-shared", "-fPIC", "-x", "c++", "-", "-o", marks]
        subprocess.run(build, input=_MARKS, text=True, check=True)
        out = Path(folder) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "--quiet"]
        program = [sys.executable, "-m", "fusewright_bench.studies.instruction_count", "--marks", marks]
        # Hash seeds and addresses move dictionaries, and with them some instructions of Python's.
        environment = {**os.environ, "FUSEWRIGHT_CPU_ISA": ISA, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *program], env=environment, check=True)
        return dict(_dumped(Path(folder)))


def _dumped(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.glob("callgrind.out.*"), key=lambda path: int(path.name.rpartition(".")[2])):
        text = path.read_text(encoding="utf-8", errors="replace")
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
        if name and total:
            yield name.group(1), int(total.group(1))


def run_cases(marks: str) -> None:
    """Inside callgrind: one marked call of every case and provider, after one that is not counted."""
    import torch

    from fusewright_bench import selection
    from fusewright_bench.case import bind_call

    torch.set_num_threads(1)
    library = ctypes.CDLL(marks)
    for op, (shape, modes) in CASES.items():
        for case in selection.cases(ops=[op], shapes=[shape], modes=modes):
            inputs = case.inputs(torch.device("cpu"))
            for provider in case.operation.providers(torch.device("cpu")):
                if provider.label not in ("fusewright:cpu", case.operation.baseline):
                    continue
                call = bind_call(case, provider, inputs)
                call()
                library.start()
                call()
                library.stop(f"{case.text} {provider.label}".encode())


def judge(found: Counts, kept: Counts, tolerance: float) -> tuple[list[list[str]], list[str]]:
    """Table lines of our kernels, and the names of those that execute more than is on record allows."""
    lines, grown = [], []
    for name, instructions in found.items():
        case, _, provider = name.rpartition(" ")
        if provider != "fusewright:cpu":
            continue
        before = kept.get(name)
        others = [number for other, number in found.items() if other != name and other.rpartition(" ")[0] == case]
        verdict = "new" if before is None else "same"
        if before is not None and instructions > before * (1.0 + tolerance):
            verdict = "MORE"
            grown.append(name)
        elif before is not None and instructions < before * (1.0 - tolerance):
            verdict = "fewer"
        change = "-" if before is None else f"{instructions / before - 1.0:+.1%}"
        beside = f"{instructions / others[0]:.2f}" if others else "-"
        lines.append([case, f"{instructions:,}", f"{before:,}" if before else "-", change, beside, verdict])
    return lines, grown


def main(argv: Sequence[str] | None = None) -> int:
    """Count and compare; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.marks:
        run_cases(options.marks)
        return 0
    reason = absence()
    if reason is not None:
        print(f"not counted: {reason}")
        return 0
    found, version = count(), compiler()
    kept = json.loads(options.kept.read_text(encoding="utf-8")) if options.kept.exists() else {}
    lines, grown = judge(found, kept.get(version, {}), options.tolerance)
    terminal.show_table(("case", "instructions", "on record", "change", "over baseline's", ""), lines)
    if version not in kept:
        print(f"no counts are on record for {version} (keep these: --update)")
    if options.update:
        options.kept.write_text(json.dumps({**kept, version: found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"kept {len(found)} counts in {options.kept}")
        return 0
    return 1 if grown else 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m fusewright_bench.studies.instruction_count", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("--tolerance", type=float, default=0.03, help="growth that passes, a share; default %(default)s")
    made.add_argument("--kept", type=Path, default=KEPT, metavar="PATH", help="the numbers on record")
    made.add_argument("--update", action="store_true", help="put the numbers of this run on record")
    made.add_argument("--marks", help=argparse.SUPPRESS)  # inside callgrind: the library that marks what counts
    return made


if __name__ == "__main__":
    raise SystemExit(main())
