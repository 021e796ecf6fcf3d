"""Can the verdict be trusted? Runs of the same code against each other, and against one with a planted slow-down.

Each repetition measures in three fresh processes: A and B, the same code, and P, where every kernel of ours takes
a tenth longer. B must never come out SLOWER than A, and P always. Exits with 1 if either fails.

``python -m fusewright_bench.studies.verdict_trial --repetitions 20``
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fusewright_bench import compare, selection
from fusewright_bench.case import Case, Forward, Inputs, Outputs, Provider
from fusewright_bench.plan import Plan
from fusewright_bench.report import json_file, terminal
from fusewright_bench.results import Row
from fusewright_bench.run import Runner
from fusewright_bench.verdicts import SLOWER

OURS = "fusewright"


class Silent:
    def group_started(self, index: int, text: str, seconds_left: float) -> None:
        pass

    def group_finished(self, rows: Sequence[Row]) -> None:
        pass


def slowed(provider: Provider, share: float) -> Provider:
    """``provider`` with every forward longer by ``share`` of its own time."""

    def bind(inputs: Inputs) -> Forward:
        forward = provider.bind(inputs)

        def slow() -> Outputs:
            start = time.perf_counter()
            outputs = forward()
            end = time.perf_counter()
            while time.perf_counter() < end + share * (end - start):
                pass
            return outputs

        return slow

    return replace(provider, bind=bind)


def with_slowed_kernels(case: Case, share: float) -> Case:
    def providers(original: Case, device: torch.device) -> Sequence[Provider]:
        available = original.operation.providers(device)
        return [slowed(provider, share) if provider.name == OURS else provider for provider in available]

    return replace(case, operation=replace(case.operation, providers=partial(providers, case)))


def measure(options: argparse.Namespace) -> None:
    """One run, in this process, into ``options.run``."""
    cases = selection.cases("quick", options.op, dtypes=options.dtype, modes=["fwd"])
    if options.planted:
        cases = [with_slowed_kernels(case, options.planted) for case in cases]
    plan = Plan(cases, torch.device("cpu"), (1,), options.budget, providers=frozenset({OURS}))
    json_file.write(Runner(plan, Silent()).run(), options.run)


def trial(options: argparse.Namespace, given: Sequence[str]) -> int:
    """All repetitions; returns the exit code."""
    outcomes = {"same code": Counter[str](), "planted slow-down": Counter[str]()}
    program = [sys.executable, "-m", "fusewright_bench.studies.verdict_trial", *given]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for repetition in range(options.repetitions):
            for name, planted in (("a", 0.0), ("b", 0.0), ("p", options.slow_down)):
                run = [*program, "--run", str(path / name), "--planted", str(planted)]
                subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
            before = json_file.read(path / "a")
            for kind, name in (("same code", "b"), ("planted slow-down", "p")):
                changes = compare.changes(before, json_file.read(path / name))
                judged = [change for change in changes if change.after.provider == OURS]
                outcomes[kind].update(change.verdict or "none" for change in judged)
                for change in judged:
                    if (change.verdict == SLOWER) != (name == "p"):
                        terminal.show_table(compare.HEADER, compare.lines([change]))
            print(f"repetition {repetition + 1}: {dict(outcomes['same code'])}, {dict(outcomes['planted slow-down'])}")
    false_alarms = outcomes["same code"][SLOWER]
    planted = outcomes["planted slow-down"]
    missed = planted.total() - planted[SLOWER]
    print(f"same code called SLOWER: {false_alarms}; planted slow-downs missed: {missed} of {planted.total()}")
    return 1 if false_alarms or missed else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m fusewright_bench.studies.verdict_trial", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("--repetitions", type=int, default=20)
    made.add_argument("--slow-down", type=float, default=0.1, help="share of its own time that a planted kernel loses")
    made.add_argument("--op", nargs="+", default=["causal_attention"], help="at its quick shapes")
    made.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    made.add_argument("--budget", type=float, default=12.0, help="seconds of one run")
    made.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # measure once, into this file
    made.add_argument("--planted", type=float, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(given)
    if options.run:
        measure(options)
        return 0
    return trial(options, given)


if __name__ == "__main__":
    raise SystemExit(main())
