"""``fusewright verify``: every numerical case on this device, against budgets, plain PyTorch and kept errors."""

import argparse
import json
import os
import platform as host_platform
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fusewright.testing import baseline as kept_errors
from fusewright.testing import golden
from fusewright.testing.baseline import Baseline, BaselineError
from fusewright.testing.budgets import Judgement
from fusewright.testing.case import Case, dtype_name, evaluate
from fusewright.testing.cases import CASES_VERSION, cases, ops
from fusewright_kernels import dispatch, native

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One result of one case, as measured and as judged."""

    case: Case
    result: str
    backend: str
    platform: str
    judgement: Judgement
    kept_error: float | None

    @property
    def failures(self) -> tuple[str, ...]:
        if not kept_errors.regressed(self.judgement.error, self.kept_error):
            return self.judgement.failures
        regression = f"error {self.judgement.error:.3g}u has grown from {self.kept_error:.3g}u"
        return (*self.judgement.failures, regression)

    def as_json(self) -> dict[str, Any]:
        judgement = self.judgement
        return {
            "op": self.case.op,
            "case": self.case.id,
            "dtype": dtype_name(self.case.dtype),
            "result": self.result,
            "backend": self.backend,
            "platform": self.platform,
            "error_u": judgement.error,
            "max_element_error_u": judgement.max_element_error,
            "budget_u": judgement.budget,
            "plain_error_u": judgement.plain_error,
            "error_ratio": judgement.error / judgement.plain_error if judgement.plain_error else None,
            "kept_error_u": self.kept_error,
            "failures": list(self.failures),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 all passed, 1 a failure, 2 the run could not be made."""
    arguments = _parser().parse_args(argv)
    backend = None if arguments.backend == "auto" else arguments.backend
    device = _device(backend)
    try:
        kept = kept_errors.load(arguments.baseline)
        rows, refused = run(cases(arguments.op or None), backend, device, kept)
        if refused and not rows:
            print(f"fusewright verify: {refused[0].reason}", file=sys.stderr)
            return 2
        exact = [] if arguments.op else list(golden.compare(backend, device))
        _report(rows, refused, kept, details=arguments.details)
        _report_exact(exact)
        if arguments.json is not None:
            _write_json(rows, exact, arguments.json)
        if arguments.update:
            return _update(rows, kept, arguments.baseline)
    except BaselineError as error:
        print(f"fusewright verify: {error}", file=sys.stderr)
        return 2
    return 1 if any(row.failures for row in rows) or any(result.failure for result in exact) else 0


@dataclass(frozen=True)
class Refused:
    """A case that the backend, asked for by name, cannot serve."""

    case: Case
    reason: str


def run(
    chosen: Iterable[Case], backend: str | None, device: torch.device, kept: Baseline
) -> tuple[list[Row], list[Refused]]:
    """Evaluate cases on ``backend`` (None: the one that dispatch chooses) and compare with the ``kept`` errors."""
    rows: list[Row] = []
    refused: list[Refused] = []
    for case in chosen:
        with dispatch.recording() as decisions, warnings.catch_warnings():
            # torch says that its own rms_norm has no fused form for mixed dtypes.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            try:
                judgements = evaluate(case, backend, device, interpreted=_interpreted(backend))
            except dispatch.RefusedBackendError as error:
                refused.append(Refused(case, str(error)))
                continue
        served = decisions[0].backend
        platform = platform_of(served, device)
        for result, judgement in judgements.items():
            rows.append(Row(case, result, served, platform, judgement, kept.kept(platform, case.id, result)))
    return rows, refused


def platform_of(backend: str, device: torch.device) -> str:
    """The key of kept errors: device kind, backend and instruction set."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}/{backend}/sm_{major}{minor}"
    if backend == "cpu":
        return f"{host_platform.machine()}/{backend}/{native.cpu_isa()}"
    return f"{host_platform.machine()}/{backend}/{torch.backends.cpu.get_cpu_capability().lower()}"


def _interpreted(backend: str | None) -> bool:
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def _device(backend: str | None) -> torch.device:
    """CUDA for its backends, and for any choice of ours where there is one; Triton's interpreter takes CPU tensors."""
    on_cuda = backend in (None, "cuda", "triton", "reference") and not _interpreted(backend)
    return torch.device("cuda" if on_cuda and torch.cuda.is_available() else "cpu")


def _update(rows: list[Row], kept: Baseline, path: Path) -> int:
    """Keep the errors of this run, unless one is above its budget: such an error is to be mended, not kept."""
    above = [row for row in rows if not row.judgement.passed]
    if above:
        print(f"{len(above)} results fail without regard to kept errors; {path} is unchanged", file=sys.stderr)
        return 1
    for row in rows:
        kept.keep(row.platform, row.case.id, row.result, row.judgement.error)
    kept_errors.save(kept, path)
    print(f"kept {len(rows)} errors in {path}")
    return 0


def _write_json(rows: list[Row], exact: list[golden.Comparison], path: Path) -> None:
    report = {
        "schema_version": SCHEMA_VERSION,
        "cases_version": CASES_VERSION,
        "environment": {
            "python": host_platform.python_version(),
            "torch": torch.__version__,
            "machine": host_platform.machine(),
            "system": host_platform.platform(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "cases": [row.as_json() for row in rows],
        "exact": [{**asdict(result), "failure": result.failure} for result in exact],
    }
    # Python's JSON writes infinity as a word that other readers refuse.
    path.write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and abs(value) == float("inf"):
        return "inf"
    return value


def _report_exact(exact: list[golden.Comparison]) -> None:
    """One line on the results that have no error but only bits, and one for each that changed or was not computed."""
    if not exact:
        return
    for result in exact:
        if result.failure or result.refusal:
            print(f"{'FAIL' if result.failure else 'not computed:'} {result.name}: {result.failure or result.refusal}")
    same = sum(result.digest is not None and result.failure is None for result in exact)
    print(f"{same} of {len(exact)} exact results have the bits on record")


_COLUMNS = ("op", "dtype", "result", "cases", "worst", "budget", "PyTorch", "")


def _report(rows: list[Row], refused: list[Refused], kept: Baseline, *, details: bool) -> None:
    """A line per op, dtype and result with its worst case, or per case; then what was refused, and every failure."""
    for platform in sorted({row.platform for row in rows}):
        groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in rows:
            if row.platform == platform:
                name = row.case.id if details else row.case.op
                groups[name, dtype_name(row.case.dtype), row.result].append(row)
        _print_table(platform, [[*key, *_summary(members)] for key, members in groups.items()])
        if not kept.knows(platform):
            print(f"no errors are kept for {platform}: judged by budgets and PyTorch only (keep these: --update)")
    for reason, number in Counter(refusal.reason for refusal in refused).items():
        print(f"skipped {number} cases: {reason}")
    for row in rows:
        for failure in row.failures:
            print(f"FAIL {row.case.id} {row.result}: {failure}")
    failed = sum(bool(row.failures) for row in rows)
    print(f"{len(rows)} results of {len({row.case.id for row in rows})} cases: {failed or 'none'} failed")


def _summary(members: list[Row]) -> list[str]:
    worst = max(members, key=lambda row: row.judgement.error / row.judgement.budget).judgement
    plain = max(row.judgement.plain_error or 0.0 for row in members)
    verdict = "FAIL" if any(row.failures for row in members) else "pass"
    return [str(len(members)), f"{worst.error:.3g}u", f"{worst.budget:.3g}u", f"{plain:.3g}u", verdict]


def _print_table(title: str, lines: list[list[str]]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[column]) for line in [list(_COLUMNS), *lines]) for column in range(len(_COLUMNS))]
        print(title)
        for line in [list(_COLUMNS), *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(*_COLUMNS, title=title, box=box.SIMPLE_HEAD)
    for line in lines:
        table.add_row(*line, style="red" if line[-1] == "FAIL" else None)
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusewright verify", description=__doc__)
    parser.add_argument("--backend", choices=("auto", *dispatch.BACKENDS), default="auto", help="default: %(default)s")
    parser.add_argument("--op", action="append", choices=ops(), help="only this op; may be repeated")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every result here")
    parser.add_argument("--baseline", type=Path, metavar="PATH", default=kept_errors.SHIPPED, help="the kept errors")
    parser.add_argument("--update", action="store_true", help="keep the errors of this run in the baseline")
    parser.add_argument("--details", action="store_true", help="a line per case")
    return parser


if __name__ == "__main__":
    sys.exit(main())
