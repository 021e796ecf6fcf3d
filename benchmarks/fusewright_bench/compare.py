"""Two result files against each other: what became faster, what became slower."""

import math
from dataclasses import dataclass

from fusewright_bench.report import table
from fusewright_bench.results import Results, Row
from fusewright_bench.verdicts import BETWEEN_RUNS_BAND, FASTER, SAME, SLOWER, UNCLEAR, Interval, verdict

_MACHINE = ("device", "cpu_model", "cores")
_BUILD = ("isa", "versions", "variables")

HEADER = ("op", "shape", "dtype", "mode", "thr", "provider", "time A", "time B", "A/B", "change [95 %]", "verdict")


@dataclass(frozen=True)
class Change:
    """One row of run B against the same row of run A; a ratio above 1 says that B is faster.

    ``ratio`` compares the two speed-ups over the baseline, so that a machine that was slower as a whole during one
    of the runs cancels. It is None for a row without a speed-up, such as the baseline itself. The row is FASTER or
    SLOWER only where its own time says so too: else it is the baseline that has moved.
    """

    before: Row
    after: Row
    ratio: float | None
    interval: Interval | None
    verdict: str | None


def changes(before: Results, after: Results) -> list[Change]:
    """Rows that both runs measured, in the order of ``after``."""
    known = {(row.case_key, row.label): row for row in before.cases}
    paired = ((known.get((row.case_key, row.label)), row) for row in after.cases)
    return [_change(old, row) for old, row in paired if old is not None and old.time_us and row.time_us]


def _change(before: Row, after: Row) -> Change:
    same_baseline = before.baseline is not None and before.baseline == after.baseline
    if not same_baseline or after.provider == after.baseline:
        return Change(before, after, None, None, None)
    assert before.ratio and after.ratio and before.interval and after.interval
    ratio = after.ratio / before.ratio
    # Independent runs: the half-widths of the two intervals add in quadrature, on a logarithmic scale.
    below = math.hypot(math.log(after.ratio / after.interval[0]), math.log(before.interval[1] / before.ratio))
    above = math.hypot(math.log(after.interval[1] / after.ratio), math.log(before.ratio / before.interval[0]))
    interval = Interval(ratio * math.exp(-below), ratio * math.exp(above))
    judged = verdict(interval, BETWEEN_RUNS_BAND)
    assert before.time_us and after.time_us
    if (judged == SLOWER and after.time_us <= before.time_us) or (judged == FASTER and after.time_us >= before.time_us):
        judged = UNCLEAR
    return Change(before, after, ratio, interval, judged)


def any_slower(found: list[Change]) -> bool:
    return any(change.verdict == SLOWER for change in found)


@dataclass(frozen=True)
class Difference:
    """Something in which the circumstances of two runs differ; on another machine no verdict means anything."""

    text: str
    other_machine: bool


def mismatches(before: Results, after: Results) -> list[Difference]:
    """In what the two runs differ so that times, and to a degree speed-ups, do not compare."""
    found = []
    for name in (*_MACHINE, *_BUILD):
        old, new = before.environment.get(name), after.environment.get(name)
        if old != new:
            kind = "not the same machine" if name in _MACHINE else "not the same software"
            found.append(Difference(f"{kind}, {name}: A has {old}, B has {new}", name in _MACHINE))
    return found


def unpaired(before: Results, after: Results) -> list[str]:
    """What one of the two runs lacks, in words: rows that only the other measured, or that failed."""
    keys = [{(row.case_key, row.label) for row in results.cases if row.time_us} for results in (before, after)]
    missing = {"rows of A that B lacks": keys[0] - keys[1], "rows of B that A lacks": keys[1] - keys[0]}
    failed = [
        f"failed in B: {row.op} {row.shape} {row.dtype} {row.mode} {row.label}: {row.failure}"
        for row in after.cases
        if row.failure and (row.case_key, row.label) in keys[0]
    ]
    return [f"{text}: {len(rows)}" for text, rows in missing.items() if rows] + failed


def summary(found: list[Change]) -> str:
    """One line: how many rows of each verdict, the geometric mean of the changes and the largest either way."""
    judged = [change for change in found if change.ratio is not None]
    if not judged:
        return "nothing has a speed-up in both runs to compare"
    counts = {name: sum(change.verdict == name for change in judged) for name in (SLOWER, FASTER, SAME, UNCLEAR)}
    ratios = [change.ratio for change in judged if change.ratio is not None]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{told}; B is {mean:.3f}x as fast in the geometric mean, {min(ratios):.2f}x to {max(ratios):.2f}x"


def lines(found: list[Change]) -> list[list[str]]:
    """Cells of the table under :data:`HEADER`."""
    return [
        [
            change.after.op,
            change.after.shape,
            change.after.dtype,
            change.after.mode,
            str(change.after.threads),
            change.after.label,
            table.time_text(change.before.time_us),
            table.time_text(change.after.time_us),
            f"{_times(change):.2f}x",
            _interval_text(change),
            change.verdict or table.ABSENT,
        ]
        for change in found
    ]


def _times(change: Change) -> float:
    assert change.before.time_us and change.after.time_us
    return change.before.time_us / change.after.time_us


def _interval_text(change: Change) -> str:
    if change.ratio is None or change.interval is None:
        return table.ABSENT
    return f"{change.ratio:.2f}x [{change.interval.low:.2f}, {change.interval.high:.2f}]"
