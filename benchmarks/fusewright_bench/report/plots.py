"""The charts of a run as PNG files, drawn by matplotlib."""

import re
from pathlib import Path

from matplotlib.figure import Figure

from fusewright_bench.report.charts import Chart, roofline_charts, scaling_charts
from fusewright_bench.results import Results

_MARKERS = "osD^"


def write(results: Results, folder: Path) -> None:
    """One file per chart, named after its title."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in (*scaling_charts(results), *roofline_charts(results)):
        name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
        _draw(chart).savefig(folder / f"{name}.png", dpi=150)


def _draw(chart: Chart) -> Figure:
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    if chart.roof:
        axes.plot(*zip(*chart.roof, strict=True), color="black", linewidth=1.2)
    for series in chart.series:
        axes.plot(
            *zip(*series.points, strict=True),
            label=series.name,
            marker=_MARKERS[series.style % len(_MARKERS)],
            color=f"C{series.style % 10}",
            linestyle="-" if series.line else "none",
        )
    axes.set(xscale="log", yscale="log", xlabel=chart.x.title, title=chart.title)
    axes.set_ylabel(chart.y.title)
    axes.yaxis.set_major_formatter(lambda value, _: chart.y.text(value))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
