"""How time and memory grow along an axis: curves of a run and the exponents fitted to them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import TypeVar

from fusewright_bench.results import COPY, Results, Row

Key = TypeVar("Key")

THREADS = "threads"

HEADER = ("op", "over", "dtype", "mode", "thr", "provider", "from", "to", "time", "memory")


@dataclass(frozen=True)
class Curve:
    """One provider along one axis: (size, microseconds) and (size, bytes), by increasing size."""

    op: str
    axis: str
    dtype: str
    mode: str
    threads: int | None  # None where the axis is the thread count
    label: str
    times_us: tuple[tuple[float, float], ...]
    memory: tuple[tuple[float, float], ...]

    @property
    def group(self) -> tuple[str, str, str, str, int | None]:
        """What the curves that belong into one chart share."""
        return self.op, self.axis, self.dtype, self.mode, self.threads


def curves(results: Results) -> list[Curve]:
    """Every provider along every axis of the run's studies, and over the threads at the largest shape of each study."""
    timed = [row for row in results.cases if row.time_us and row.provider != COPY]
    found = []
    for study in results.studies:
        rows = [row for row in timed if row.op == study.op and row.shape in study.sizes]
        for (dtype, mode, threads, label), own in _grouped(
            rows, lambda row: (row.dtype, row.mode, row.threads, row.label)
        ):
            sized = [(float(study.sizes[row.shape]), row) for row in own]
            found.append(_curve(study.op, study.axis, dtype, mode, threads, label, sized))
    largest = [(study.op, max(study.sizes, key=lambda name: study.sizes[name])) for study in results.studies]
    for op, shape in dict.fromkeys(largest):
        rows = [row for row in timed if (row.op, row.shape) == (op, shape)]
        for (dtype, mode, label), own in _grouped(rows, lambda row: (row.dtype, row.mode, row.label)):
            sized = [(float(row.threads), row) for row in own]
            found.append(_curve(f"{op} {shape}", THREADS, dtype, mode, None, label, sized))
    return [curve for curve in found if len(curve.times_us) >= 2]


def _grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> Iterable[tuple[Key, list[Row]]]:
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups.items()


def _curve(
    op: str, axis: str, dtype: str, mode: str, threads: int | None, label: str, sized: Sequence[tuple[float, Row]]
) -> Curve:
    ordered = sorted(sized, key=lambda pair: pair[0])
    times = tuple((size, row.time_us) for size, row in ordered if row.time_us is not None)
    memory = tuple((size, float(row.peak_memory_bytes)) for size, row in ordered if row.peak_memory_bytes is not None)
    return Curve(op, axis, dtype, mode, threads, label, times, memory)


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """a of the least-squares fit y ~ x^a to the upper half of the points, where overheads weigh least; at least three.

    None with fewer points or a value that has no logarithm.
    """
    upper = sorted(points)[-max(3, (len(points) + 1) // 2) :]
    if len(upper) < 3 or any(y <= 0 for _, y in upper):
        return None
    return linear_regression([math.log(x) for x, _ in upper], [math.log(y) for _, y in upper]).slope


def lines(results: Results) -> list[list[str]]:
    """Cells of the table under :data:`HEADER`; for the threads, the speed-up from the fewest to the most."""
    made = []
    for curve in curves(results):
        sizes = [f"{curve.times_us[0][0]:g}", f"{curve.times_us[-1][0]:g}"]
        if curve.axis == THREADS:
            fits = [f"{curve.times_us[0][1] / curve.times_us[-1][1]:.2f}x the speed", ""]
        else:
            fits = [_power(exponent(curve.times_us)), _power(exponent(curve.memory))]
        threads = "" if curve.threads is None else str(curve.threads)
        made.append([curve.op, curve.axis, curve.dtype, curve.mode, threads, curve.label, *sizes, *fits])
    return made


def _power(fitted: float | None) -> str:
    return "-" if fitted is None else f"n^{fitted:.2f}"
