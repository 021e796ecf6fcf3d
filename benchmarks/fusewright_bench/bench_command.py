"""``fusewright bench``: from the options to a plan, a watched run and its reports."""

import argparse
import importlib.util
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fusewright_bench import supervisor
from fusewright_bench.exit_codes import BROKEN, INTERRUPTED, OK, SLOWER_FOUND
from fusewright_bench.report import json_file
from fusewright_bench.results import Results
from fusewright_bench.watch import FileWatch

if TYPE_CHECKING:
    from fusewright_bench.plan import Plan

_SUITE_BUDGET_S = {"quick": 140.0, "micro": 90.0, "models": 900.0, "scaling": 600.0, "full": 3600.0}
_THREADS = {
    "quick": lambda cores: (cores,),
    "scaling": lambda cores: (*(2**power for power in range(cores.bit_length())), cores),
}
# Without --budget, a selection of few cases ends early rather than use up a budget made for a whole suite.
_GROUP_BUDGET_S = 4.0


def bench(options: argparse.Namespace, given: list[str], parser: argparse.ArgumentParser) -> int:
    """Run the command; returns its exit code. ``given`` are the arguments that ``options`` were parsed from."""
    kept = None
    if options.supervised:
        given = given[: given.index(supervisor.OPTION)]
        options.json = options.supervised[1]
    if options.resume:
        try:
            kept = json_file.read(options.resume)
        except json_file.ResultFileError as error:
            parser.error(str(error))
        options, given = _of_the_interrupted_run(kept, options, parser)
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install 'fusewright[bench]'")
    if not options.supervised and not options.list:
        json_path = options.json or Path("fusewright-results") / datetime.now().strftime("%Y%m%d-%H%M%S.json")
        if json_path.suffix != ".json":
            parser.error(f"--json is {json_path}, expected a name that ends in .json")
        arguments = ["bench", "--resume", str(json_path)] if kept else given
        return supervisor.supervise(arguments, json_path, options.time_limit)
    # torch is imported only from here on: the process that watches another has no use for it.
    from fusewright_bench import selection

    try:
        plan = _plan(options, shlex.join(["fusewright", *given]))
    except selection.UsageError as error:
        parser.error(str(error))
    if options.list:
        _list(plan)
        return OK
    if kept:
        _refuse_another_machine(kept, plan, options, parser)
    try:
        return measure(plan, options, kept)
    except Exception:
        traceback.print_exc()  # a fault of the suite's own: not to be taken for the exit code of a slower kernel
        return BROKEN


def _of_the_interrupted_run(
    kept: Results, options: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str]]:
    given = shlex.split(kept.command)[1:]
    if given[:1] != ["bench"]:
        parser.error(f"--resume is {options.resume}, expected results of `fusewright bench`, not {kept.command!r}")
    if kept.complete:
        parser.error(f"--resume is {options.resume}, expected an interrupted run: this one is complete")
    again = parser.parse_args(given)
    again.json, again.supervised = options.resume, options.supervised
    return again, given


def _refuse_another_machine(
    kept: Results, plan: "Plan", options: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    from fusewright_bench import environment
    from fusewright_bench.compare import mismatches

    here = Results(environment.capture(plan.device, plan.threads), plan.command)
    for difference in mismatches(kept, here):
        if difference.other_machine:
            parser.error(f"--resume is {options.resume}, A, and this is B: {difference.text}")


def _plan(options: argparse.Namespace, command: str) -> "Plan":
    import torch

    from fusewright_bench import selection
    from fusewright_bench.plan import Plan

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise selection.UsageError(f"--device is {options.device!r}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        expected = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise selection.UsageError(f"--device is {device}, expected {expected}")
    chosen = selection.cases(options.suite, options.op, options.shape, options.dtype, options.mode)
    if not chosen:
        raise selection.UsageError("no case has all of the names given; `fusewright bench --list` prints what there is")
    named = [*options.provider, *([options.baseline] if options.baseline else [])]
    selection.check_providers(named, options.backend, chosen, device)
    if options.pin and not hasattr(os, "sched_setaffinity"):
        raise selection.UsageError("--pin needs a system with processor affinity, such as Linux")
    suite = options.suite or "quick"
    cores = torch.get_num_threads()
    wanted = options.threads or _THREADS.get(suite, lambda cores: (1, cores))(cores)
    threads = tuple(dict.fromkeys(wanted))
    if device.type == "cuda":
        threads = (cores,)
    every = selection.EVERY_PROVIDER in options.provider or (suite == selection.FULL and not options.provider)
    return Plan(
        cases=chosen,
        device=device,
        threads=threads,
        budget_s=options.budget or min(_SUITE_BUDGET_S[suite], _GROUP_BUDGET_S * len(chosen) * len(threads)),
        providers=frozenset(options.provider) if options.provider and not every else None,
        backends=frozenset(options.backend) if options.backend else None,
        every_provider=every,
        baseline=options.baseline,
        cold=options.cold,
        pin=options.pin,
        command=command,
    )


def measure(plan: "Plan", options: argparse.Namespace, kept: Results | None = None) -> int:
    """Run ``plan``, going on from ``kept``, and write its reports; returns the exit code."""
    from fusewright_bench.report import terminal
    from fusewright_bench.run import Runner
    from fusewright_bench.verdicts import SLOWER

    def save(results: Results) -> None:
        json_file.write(results, options.json)

    with terminal.progress(plan.groups) as progress:
        runner = Runner(plan, progress, kept=kept, watch=FileWatch(options.supervised[0]), save=save)
        try:
            results = runner.run()
        finally:
            # Also where a case could not even be set up: what was measured before it is worth keeping.
            save(runner.results)
    terminal.show(results)
    for kind, path in _reports(results, options).items():
        print(f"{kind + ':':9} {path}")
    if not results.complete:
        print(f"interrupted; to go on: fusewright bench --resume {options.json}", file=sys.stderr)
        return INTERRUPTED
    slower = any(row.verdict == SLOWER and row.provider == "fusewright" for row in results.cases)
    return SLOWER_FOUND if slower and options.fail_on else OK


def _reports(results: Results, options: argparse.Namespace) -> dict[str, Path]:
    """Write every report that is wanted; by kind, where they are."""
    from fusewright_bench.report import csv_file, html_page, markdown, plots

    written = {
        "results": options.json,
        "report": options.markdown or options.json.with_suffix(".md"),
        "page": options.html or options.json.with_suffix(".html"),
    }
    markdown.write(results, written["report"])
    html_page.write(results, written["page"])
    if options.csv:
        csv_file.write(results, options.csv)
        written["csv"] = options.csv
    if options.plots:
        plots.write(results, options.plots)
        written["plots"] = options.plots
    return written


def _list(plan: "Plan") -> None:
    from fusewright_bench.case import dtype_name
    from fusewright_bench.report import terminal

    lines = [
        [case.operation.name, case.shape.text, dtype_name(case.dtype), case.mode, ",".join(sorted(case.shape.suites))]
        for case in plan.cases
    ]
    terminal.show_table(("op", "shape", "dtype", "mode", "suites"), lines)
    print()
    terminal.show_table(("op", "provider", "runs", "why not, and what would bring it"), _provider_lines(plan))


def _provider_lines(plan: "Plan") -> Sequence[Sequence[str]]:
    lines = []
    for case in {case.operation.name: case for case in plan.cases}.values():
        for provider in case.operation.providers(plan.device):
            reason = provider.absence(plan.device, case.dtype)
            runs = "yes" if plan.wants(provider, case) else "if named"
            install = f" ({provider.install})" if reason and provider.install else ""
            lines.append([case.operation.name, provider.label, "no" if reason else runs, (reason or "") + install])
    return lines
