"""Two result files against each other: what became faster, what became slower."""

import math
from dataclasses import dataclass

from fusewright_bench.report import table
from fusewright_bench.results import Results, Row
from fusewright_bench.verdicts import SLOWER, Interval, verdict

HEADER = ("op", "shape", "dtype", "mode", "thr", "provider", "time A", "time B", "A/B", "change [95 %]", "verdict")


@dataclass(frozen=True)
class Change:
    """One row of run B against the same row of run A; a ratio above 1 says that B is faster.

    ``ratio`` compares the two speed-ups over the baseline, so that a machine that was slower as a whole during one
    of the runs cancels. It is None for a row without a speed-up, such as the baseline itself.
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
    return Change(before, after, ratio, interval, verdict(interval))


def any_slower(found: list[Change]) -> bool:
    return any(change.verdict == SLOWER for change in found)


def mismatches(before: Results, after: Results) -> list[str]:
    """In what the two machines differ so that times, and to a degree speed-ups, do not compare."""
    return [
        f"{name}: A has {before.environment.get(name)}, B has {after.environment.get(name)}"
        for name in ("device", "cpu_model", "cores", "isa", "versions")
        if before.environment.get(name) != after.environment.get(name)
    ]


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
