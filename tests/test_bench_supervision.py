"""A run survives its providers: one that throws, hangs, crashes or lies costs a row, and what is done is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusewright_bench import supervisor
from fusewright_bench.exit_codes import INTERRUPTED, OK
from fusewright_bench.report import json_file
from fusewright_bench.results import COPY, Results, Row
from fusewright_bench.watch import FileWatch, read_step

# A measuring process in which softmax has providers that fail in the worst ways.
WORKER = """
import os, signal, sys, time
import torch
from dataclasses import replace
from fusewright_bench import cases, cli
from fusewright_bench import roofline
from fusewright_bench.case import Provider

roofline._host_probes = lambda: (None, "left out of this test")
roofline._FAR_BEYOND_CACHE_BYTES["cpu"] = 1 << 20
roofline._MATRIX_SIZE["cpu"] = 64

def crash(inputs):
    os.kill(os.getpid(), signal.SIGSEGV)

def hang_while_timed(inputs):
    calls = []
    def forward():
        calls.append(None)
        if len(calls) > 20:
            time.sleep(1000)
        return (inputs["input"].softmax(-1),)
    return forward

def nap(inputs):
    time.sleep({nap})
    return lambda: (inputs["input"].softmax(-1),)

softmax = cases.OPERATIONS["softmax"]
torch_alone = [provider for provider in softmax.providers(torch.device("cpu")) if provider.name == "torch"]
extra = [Provider("crash", "none", crash), Provider("hang", "none", hang_while_timed), Provider("nap", "none", nap)]
cases.OPERATIONS["softmax"] = replace(softmax, providers=lambda device: [*extra, *torch_alone])
sys.exit(cli.main(sys.argv[1:]))
"""
CASE = ["bench", "--op", "softmax", "--dtype", "float32", "--mode", "fwd", "--threads", "1", "--budget", "0.2"]


def worker(folder: Path, nap: float = 0.0) -> list[str]:
    script = folder / "worker.py"
    script.write_text(WORKER.replace("{nap}", str(nap)))
    return [sys.executable, str(script)]


def test_a_crash_and_a_hang_become_rows_and_the_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    arguments = [*CASE, "--shape", "8x32", "--time-limit", "8"]
    assert supervisor.supervise(arguments, path, 8.0, worker(tmp_path)) == OK
    results = json_file.read(path)
    rows = {row.label: row for row in results.cases}
    assert results.complete and rows.keys() == {"crash", "hang", "nap", "torch", COPY}
    assert rows["crash"].failure == "crashed: SIGSEGV" and rows["hang"].failure == "gave no answer within 8 s"
    assert rows["torch"].time_us and rows["nap"].time_us and rows[COPY].time_us
    assert results.command == " ".join(["fusewright", *arguments])
    assert {"results.json", "results.md", "results.html"} <= {entry.name for entry in tmp_path.iterdir()}
    assert "crashed: SIGSEGV" in capfd.readouterr().err and "crashed: SIGSEGV" in path.with_suffix(".md").read_text()


def test_an_interrupted_run_is_saved_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    program = (
        "import sys; from pathlib import Path; from fusewright_bench import supervisor;"
        " sys.exit(supervisor.supervise(sys.argv[4:], Path(sys.argv[1]), 60.0, sys.argv[2:4]))"
    )
    slow = worker(tmp_path, nap=1000.0)
    arguments = [*CASE, "--shape", "8x32", "--provider", "nap"]
    process = subprocess.Popen([sys.executable, "-c", program, str(path), *slow, *arguments], stderr=subprocess.PIPE)
    while not path.exists():
        time.sleep(0.1)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == INTERRUPTED and "--resume" in errors
    assert not json_file.read(path).complete
    assert supervisor.supervise(["bench", "--resume", str(path)], path, 60.0, worker(tmp_path)) == OK
    again = json_file.read(path)
    assert again.complete and {row.label for row in again.cases} == {"nap", "torch", COPY}


def row(**changes: object) -> Row:
    settings = {"op": "o", "shape": "s", "sizes": [1], "dtype": "float32", "mode": "fwd", "threads": 1}
    return Row(**settings, provider="p", backend="b", reproduce="", flops=0, bytes=0, **changes)  # type: ignore[arg-type]


def test_a_watch_tells_the_step_and_its_start(tmp_path: Path) -> None:
    path = tmp_path / "step"
    path.write_text("")
    assert read_step(path) is None
    watch = FileWatch(path)
    before = time.monotonic()
    watch.step(row(notes=["a longer text than the next"]))
    watch.step(row())
    step = read_step(path)
    assert step is not None and step.row == row() and before <= step.since <= time.monotonic()
    watch.rest()
    assert read_step(path) is None


def test_a_row_that_fails_again_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    json_file.write(Results({}, "fusewright bench", [row(failure="crashed before")]), path)
    script = tmp_path / "crashes.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom fusewright_bench.watch import FileWatch\n"
        "from fusewright_bench.report import json_file\n"
        f"FileWatch(Path(sys.argv[-2])).step(json_file.read(Path({str(path)!r})).cases[0])\nos.abort()\n"
    )
    code = supervisor.supervise(["bench"], path, 60.0, [sys.executable, str(script)])
    assert code == 128 + signal.SIGABRT and "SIGABRT" in capfd.readouterr().err
    assert os.path.getsize(path) and len(json_file.read(path).cases) == 1


def test_a_process_that_ignores_an_interrupt_is_ended_by_the_second(tmp_path: Path) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "open(sys.argv[0] + '.ready', 'w').close()\ntime.sleep(1000)\n"
    )
    program = (
        "import sys; from pathlib import Path; from fusewright_bench import supervisor;"
        " sys.exit(supervisor.supervise(['bench'], Path(sys.argv[1]), 60.0, sys.argv[2:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a.json"), sys.executable, str(script)])
    while not Path(f"{script}.ready").exists():
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(timeout=30) == INTERRUPTED
