"""The command ``fusewright``: bench, verify, compare, doctor, explain."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusewright_bench import supervisor

_BENCH_EPILOG = """\
examples:
  fusewright bench                                        every op, the quick suite
  fusewright bench --suite models --dtype bfloat16        shapes of real models
  fusewright bench --op rms_norm --shape 300x5000 --mode fwd,both --threads 1,2
  fusewright bench --op softmax --fail-on slower          exit code 1 if a kernel of ours is slower than torch
  fusewright bench --op attention --provider all --list   what there is to compare with, and why some of it is absent

suites: quick (on all cores; the others also on 1), micro (sizes), models (shapes of real models),
scaling (over length, width, batch and threads), full (every shape and provider)
A provider that throws, hangs, crashes or answers wrongly becomes a marked row. Results are saved every few seconds.

exit codes: 0 done, 1 something is slower and --fail-on was given, 2 wrong usage, 3 the suite itself failed,
130 interrupted (what is done is saved: --resume PATH goes on), 128 + N ended by signal N
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
        raise ValueError("expected a number above 0")
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
    bench.add_argument("--suite", metavar="NAME", help="quick (default), micro, models, scaling or full")
    bench.add_argument("--op", **several, help="only these ops")
    bench.add_argument("--provider", **several, help="only these providers, and the baseline; all for every one")
    bench.add_argument("--backend", **several, help="only providers of these backends, and the baseline")
    bench.add_argument("--dtype", **several, help="float32 and bfloat16 unless given; also float16")
    bench.add_argument("--shape", **several, help="shapes by name or size, such as gpt2 or 512x4096, of any suite")
    bench.add_argument("--mode", **several, help="fwd, bwd, or both in one call; fwd,both unless given")
    bench.add_argument(
        "--threads",
        type=_thread_counts,
        metavar="N,...",
        help="CPU thread counts; all cores in the quick suite, in others 1 as well",
    )
    bench.add_argument("--device", metavar="DEVICE", help="cpu or cuda; cuda where there is one")
    bench.add_argument("--baseline", metavar="NAME", help="what speed-ups are over; torch where it has the op")
    bench.add_argument("--budget", type=_positive_seconds, metavar="SECONDS", help="time to spend on the whole run")
    bench.add_argument(
        "--time-limit",
        type=_positive_seconds,
        default=120.0,
        metavar="SECONDS",
        help="one call of a provider that takes longer ends that provider; %(default)g",
    )
    bench.add_argument("--cold", action="store_true", help="every sample is one call with empty caches")
    bench.add_argument("--pin", action="store_true", help="as many processors as threads, always the same ones")
    bench.add_argument("--list", action="store_true", help="print the cases and providers and run none")
    bench.add_argument("--resume", type=Path, metavar="PATH", help="go on with the interrupted run in this JSON file")
    bench.add_argument("--json", type=Path, metavar="PATH", help="where the results go; the other files lie beside it")
    bench.add_argument("--markdown", type=Path, metavar="PATH", help="where the Markdown report goes")
    bench.add_argument("--html", type=Path, metavar="PATH", help="where the page to look at in a browser goes")
    bench.add_argument("--csv", type=Path, metavar="PATH", help="also write one line per row here")
    bench.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw PNG plots here; needs matplotlib")
    bench.add_argument("--fail-on", choices=["slower"], help="exit with 1 if a kernel of ours is SLOWER")
    # Last in the command of the process that the supervisor watches: where it tells its steps, where results go.
    bench.add_argument(supervisor.OPTION, dest="supervised", type=Path, nargs=2, help=argparse.SUPPRESS)


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
    if options.command == "compare":
        from fusewright_bench.compare_command import compare

        return compare(options)
    from fusewright_bench.bench_command import bench

    return bench(options, given, parser)
