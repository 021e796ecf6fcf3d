"""The charts of a run: what each plots, whoever draws it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusewright_bench import scaling
from fusewright_bench.report import table
from fusewright_bench.results import COPY, Results, Row

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points whose coordinates are above 0; ``labels`` say what each is. ``style`` numbers its colour and mark: a
    provider has the same one in every chart."""

    name: str
    style: int
    points: Sequence[Point]
    labels: Sequence[str]
    line: bool = True


@dataclass(frozen=True)
class Axis:
    title: str
    text: Callable[[float], str] = lambda value: f"{value:g}"


@dataclass(frozen=True)
class Chart:
    """Both axes are logarithmic; ``roof`` is the line of what this machine can do."""

    title: str
    caption: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    roof: Sequence[Point] = ()


def roofline_charts(results: Results) -> Iterator[Chart]:
    """Arithmetic over bytes against the rate reached: a chart per dtype and thread count, a series per provider."""
    timed = [row for row in results.cases if row.time_us and row.flops and row.provider != COPY]
    styles = _styles(row.label for row in timed)
    for dtype, threads in dict.fromkeys((row.dtype, row.threads) for row in timed):
        rows = [row for row in timed if (row.dtype, row.threads) == (dtype, threads)]
        roof = _roof(results, dtype, threads, [row.flops / row.bytes for row in rows])
        yield Chart(
            f"Roofline: {dtype}, {table.threads_text(threads)}",
            "The line is what this machine reached in this run: a copy beyond every cache, then matrix products."
            " What lies in a cache, or needs no such copy, can stand above it.",
            [_rate_series(label, styles[label], rows) for label in dict.fromkeys(row.label for row in rows)],
            Axis("operations per byte"),
            Axis("GFLOP/s"),
            roof,
        )


def _styles(labels: Iterable[str]) -> dict[str, int]:
    return {label: number for number, label in enumerate(dict.fromkeys(labels))}


def _rate_series(label: str, style: int, rows: Sequence[Row]) -> Series:
    own = [row for row in rows if row.label == label]
    points = [(row.flops / row.bytes, row.flops * 1e-3 / (row.time_us or 1.0)) for row in own]
    labels = [f"{label}: {row.op} {row.shape} {row.mode}, {table.time_text(row.time_us)}" for row in own]
    return Series(label, style, points, labels, line=False)


def _roof(results: Results, dtype: str, threads: int, intensities: Sequence[float]) -> list[Point]:
    """From the lowest intensity to the highest, with the corner where the two limits meet."""
    bandwidths = [entry for entry in results.roofline.get("bandwidth", []) if entry["threads"] == threads]
    peaks = [
        entry["gflops"]
        for entry in results.roofline.get("peak", [])
        if (entry["unit"], entry["dtype"], entry["threads"]) == ("matrix", dtype, threads)
    ]
    if not bandwidths or not peaks:
        return []
    copy_gbps, peak = max(bandwidths, key=lambda entry: entry["bytes"])["copy_gbps"], peaks[0]
    corner = peak / copy_gbps
    ends = [min([*intensities, corner / 2]), corner, max([*intensities, corner * 2])]
    return [(x, min(x * copy_gbps, peak)) for x in ends]


def scaling_charts(results: Results) -> Iterator[Chart]:
    """Time and memory along every axis of growth, a series per provider, with the fitted exponents in their names."""
    curves = scaling.curves(results)
    styles = _styles(curve.label for curve in curves)
    for key in dict.fromkeys(curve.group for curve in curves):
        members = [curve for curve in curves if curve.group == key]
        op, axis, dtype, mode, threads = key
        where = f"{op} over {axis}: {dtype}, {mode}" + (f", {table.threads_text(threads)}" if threads else "")
        across = Axis(axis)
        yield Chart(
            f"Time, {where}",
            "Exponents are fitted to the upper half of the sizes.",
            [_curve_series(curve, styles, curve.times_us, table.time_text) for curve in members],
            across,
            Axis("time per call", table.time_text),
        )
        heavy = [curve for curve in members if axis != scaling.THREADS and all(size > 0 for _, size in curve.memory)]
        if heavy:
            yield Chart(
                f"Memory, {where}",
                "Peak of one call beyond its inputs.",
                [_curve_series(curve, styles, _in_mebibytes(curve.memory), _mebibytes_text) for curve in heavy],
                across,
                Axis("memory, MiB"),
            )


def _in_mebibytes(points: Sequence[Point]) -> list[Point]:
    return [(size, bytes / 2**20) for size, bytes in points]


def _mebibytes_text(mebibytes: float) -> str:
    return table.bytes_text(round(mebibytes * 2**20))


def _curve_series(
    curve: scaling.Curve, styles: Mapping[str, int], points: Sequence[Point], text: Callable[[float], str]
) -> Series:
    fitted = scaling.exponent(points)
    name = curve.label if fitted is None else f"{curve.label}: n^{fitted:.2f}"
    labels = [f"{curve.label} at {x:g}: {text(y)}" for x, y in points]
    return Series(name, styles[curve.label], points, labels)
