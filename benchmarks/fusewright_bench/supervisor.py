"""Runs the measuring process and watches over it: a provider that hangs or crashes costs one row and not the run."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fusewright_bench.exit_codes import INTERRUPTED
from fusewright_bench.report import json_file
from fusewright_bench.watch import Step, read_step

OPTION = "--supervised"
WORKER = (sys.executable, "-m", "fusewright_bench")
_POLL_S = 0.2


def supervise(arguments: Sequence[str], json_path: Path, time_limit_s: float, worker: Sequence[str] = WORKER) -> int:
    """Run ``bench`` with ``arguments`` in a process of its own, again from where it was if it dies.

    A step of more than ``time_limit_s`` seconds ends the process. The provider at fault becomes a failed row of the
    results in ``json_path``, and the next process leaves it out. Returns the exit code of the last process.
    """
    with tempfile.TemporaryDirectory() as folder:
        watch = Path(folder) / "step"
        command = list(arguments)
        while True:
            watch.write_text("")
            code, hung = _run([*worker, *command, OPTION, str(watch), str(json_path)], watch, time_limit_s)
            if code >= 0 and not hung:
                return code
            step = read_step(watch)
            failure = f"gave no answer within {time_limit_s:g} s" if hung else f"crashed: {_signal_name(-code)}"
            if step is None or not _record(step, failure, json_path):
                print(f"fusewright bench: the run {failure}; {json_path} holds what was done", file=sys.stderr)
                return 128 - code
            print(f"\n{step.row.label}: {failure}; going on without it", file=sys.stderr)
            command = ["bench", "--resume", str(json_path)]


def _run(command: Sequence[str], watch: Path, time_limit_s: float) -> tuple[int, bool]:
    """Exit code of the process, negative for a signal, and whether it had to be ended for a step that took too long."""
    with _interrupts() as interrupts:
        # In a session of its own an interrupt from the keyboard reaches it once, through this process.
        process = subprocess.Popen(command, start_new_session=True)
        passed_on = False
        while True:
            if interrupts and not passed_on:
                process.send_signal(signal.SIGINT)
                passed_on = True
            elif len(interrupts) > 1:  # asked twice: it does not answer, or not soon enough
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return INTERRUPTED, False
            try:
                return process.wait(_POLL_S), False
            except subprocess.TimeoutExpired:
                step = read_step(watch)
            if step is not None and time.monotonic() - step.since > time_limit_s:
                os.killpg(process.pid, signal.SIGKILL)
                return process.wait(), True


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The signals that asked this process to end, as they come.

    In force before the other process starts: one started while interrupts are ignored, as in the background of a shell,
    would ignore them as well.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _record(step: Step, failure: str, json_path: Path) -> bool:
    """Add the failed row to the file; False if the same row is there already, so that no run goes round in circles."""
    if not json_path.exists():
        return False
    results = json_file.read(json_path)
    if any(row.failure and row.point == step.row.point and row.label == step.row.label for row in results.cases):
        return False
    step.row.failure = failure
    results.cases.append(step.row)
    json_file.write(results, json_path)
    return True


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name}, out of memory?" if number == signal.SIGKILL else name
