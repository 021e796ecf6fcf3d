"""The command ``fusewright``: bench, verify, compare, doctor, explain."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

OK, SLOWER_FOUND, USAGE, INTERRUPTED = 0, 1, 2, 130

_SUITE_BUDGET_S = {"quick": 140.0, "micro": 90.0, "models": 900.0}
# Without --budget, a selection of few cases ends early rather than use up a budget made for a whole suite.
_GROUP_BUDGET_S = 4.0

_BENCH_EPILOG = """\
examples:
  fusewright bench                                        every op, the quick suite, about 4 minutes on 2 cores
  fusewright bench --suite models --dtype bfloat16        shapes of real models
  fusewright bench --op rms_norm --shape 300x5000 --mode fwd,both --threads 1,2
  fusewright bench --op softmax --fail-on slower          exit code 1 if a kernel of ours is slower than torch

exit codes: 0 done, 1 something is slower and --fail-on was given, 2 wrong usage,
130 interrupted (what is done is saved)
"""


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _thread_counts(text: str) -> tuple[int, ...]:
    counts = tuple(dict.fromkeys(int(count) for count in text.split(",")))
    if not counts or min(counts) < 1:
        raise ValueError("thread counts start at 1")
    return counts


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0.0:
        raise ValueError("a budget is above 0")
    return seconds


def build_parser() -> argparse.ArgumentParser:
    description = "Fused Transformer kernels: measure, verify, explain."
    parser = argparse.ArgumentParser(prog="fusewright", description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_bench(commands)
    _add_compare(commands)
    for name, help_text in (
        ("verify", "measure the error of every kernel here and compare it with what is on record"),
        ("doctor", "what works on this machine, and what to install for what does not"),
        ("explain", "which backend serves a call, and why each other one does not"),
    ):
        commands.add_parser(name, help=help_text)  # for the list of commands only: main hands these on unparsed
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure speed, memory and accuracy of the kernels",
        description="Time every kernel against torch, the plain formula and its peers, in interleaved rounds.",
        epilog=_BENCH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = {"type": _names, "action": "extend", "default": [], "metavar": "NAME,..."}
    bench.add_argument("--suite", metavar="NAME", help="quick (default), micro or models")
    bench.add_argument("--op", **several, help="only these ops")
    bench.add_argument("--provider", **several, help="only these providers, and the baseline")
    bench.add_argument("--dtype", **several, help="float32 and bfloat16 unless given; also float16")
    bench.add_argument("--shape", **several, help="shapes by name or size, such as gpt2 or 512x4096, of any suite")
    bench.add_argument("--mode", **several, help="fwd, bwd, or both in one call; fwd,both unless given")
    bench.add_argument("--threads", type=_thread_counts, metavar="N,...", help="CPU thread counts; 1 and all cores")
    bench.add_argument("--device", metavar="DEVICE", help="cpu or cuda; cuda where there is one")
    bench.add_argument("--baseline", metavar="NAME", help="what speed-ups are over; torch where it has the op")
    bench.add_argument("--budget", type=_positive_seconds, metavar="SECONDS", help="time to spend on the whole run")
    bench.add_argument("--list", action="store_true", help="print the cases and run none")
    bench.add_argument("--json", type=Path, metavar="PATH", help="where the results go, for machines")
    bench.add_argument("--markdown", type=Path, metavar="PATH", help="where the report goes, for people")
    bench.add_argument("--fail-on", choices=["slower"], help="exit with 1 if a kernel of ours is SLOWER")


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser("compare", help="what changed between two result files")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.add_argument("--fail-on", choices=["slower", "slow"], help="exit with 1 if a kernel of ours became SLOWER")
    compare.add_argument("--markdown", type=Path, metavar="PATH", help="also write the table here, for a pull request")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Imported only when asked for: verify and doctor must work where a benchmark cannot even be imported.
    if given[:1] == ["verify"]:
        from fusewright.testing.verify import main as verify_main

        return verify_main(given[1:])
    if given[:1] == ["doctor"]:
        from fusewright.diagnostics import doctor_main

        return doctor_main(given[1:])
    if given[:1] == ["explain"]:
        from fusewright.diagnostics import explain_main

        return explain_main(given[1:])
    parser = build_parser()
    options = parser.parse_args(given)
    return _bench(options, parser) if options.command == "bench" else _compare(options)


def _bench(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch

    from fusewright_bench import selection
    from fusewright_bench.run import Plan

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = selection.cases(options.suite, options.op, options.shape, options.dtype, options.mode)
        named = [*options.provider, *([options.baseline] if options.baseline else [])]
        selection.check_providers(named, chosen, device)
    except (selection.UsageError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device is {device}, expected cpu" + (" or cuda" if torch.cuda.is_available() else ""))
    if not chosen:
        parser.error("no case has all of the names given; `fusewright bench --list` prints what there is")
    if options.list:
        _list(chosen, device)
        return OK
    threads = options.threads or tuple(dict.fromkeys((1, torch.get_num_threads())))
    if device.type == "cuda":
        threads = (torch.get_num_threads(),)
    groups = len(chosen) * len(threads)
    budget_s = options.budget or min(_SUITE_BUDGET_S[options.suite or "quick"], _GROUP_BUDGET_S * groups)
    providers = frozenset(options.provider) if options.provider else None
    return _run(Plan(chosen, device, threads, budget_s, providers, options.baseline), options)


def _run(plan: Any, options: argparse.Namespace) -> int:
    from fusewright_bench.report import json_file, markdown, terminal
    from fusewright_bench.run import Runner
    from fusewright_bench.verdicts import SLOWER

    stem = Path("fusewright-results") / datetime.now().strftime("%Y%m%d-%H%M%S")
    json_path = options.json or stem.with_suffix(".json")
    markdown_path = options.markdown or stem.with_suffix(".md")
    with terminal.progress(plan.groups) as progress:
        runner = Runner(plan, progress)
        try:
            results = runner.run()
        finally:
            # Also where a case could not even be set up: what was measured before it is worth keeping.
            json_file.write(runner.results, json_path)
            markdown.write(runner.results, markdown_path)
    terminal.show(results)
    print(f"results: {json_path}\nreport:  {markdown_path}")
    if not results.complete:
        print("interrupted: the files hold what was done by then", file=sys.stderr)
        return INTERRUPTED
    slower = any(row.verdict == SLOWER and row.provider == "fusewright" for row in results.cases)
    return SLOWER_FOUND if slower and options.fail_on else OK


def _list(chosen: Sequence[Any], device: Any) -> None:
    from fusewright_bench.case import dtype_name
    from fusewright_bench.report import terminal

    lines = [
        [case.operation.name, case.shape.text, dtype_name(case.dtype), case.mode, ",".join(sorted(case.shape.suites))]
        for case in chosen
    ]
    terminal.show_table(("op", "shape", "dtype", "mode", "suites"), lines)
    for operation in {case.operation.name: case.operation for case in chosen}.values():
        names = dict.fromkeys(provider.name for provider in operation.providers(device))
        print(f"providers of {operation.name}: {', '.join(names)}")


def _compare(options: argparse.Namespace) -> int:
    from fusewright_bench import compare
    from fusewright_bench.report import json_file, table, terminal

    try:
        before, after = json_file.read(options.before), json_file.read(options.after)
    except json_file.ResultFileError as error:
        print(f"fusewright compare: {error}", file=sys.stderr)
        return USAGE
    found = compare.changes(before, after)
    if not found:
        print(f"fusewright compare: {options.before} and {options.after} have no case in common", file=sys.stderr)
        return USAGE
    differences = [f"not the same machine, {difference}" for difference in compare.mismatches(before, after)]
    lines = compare.lines(found)
    for difference in differences:
        print(difference)
    terminal.show_table(compare.HEADER, lines)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        notes = "".join(f"- {difference}\n" for difference in differences)
        options.markdown.write_text(f"{notes}\n{table.markdown_table(compare.HEADER, lines)}\n", encoding="utf-8")
    return SLOWER_FOUND if compare.any_slower(found) and options.fail_on else OK
