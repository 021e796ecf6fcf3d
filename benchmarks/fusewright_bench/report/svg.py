"""Line and scatter charts on logarithmic axes, as SVG that takes its colours from the page around it."""

import math
from collections.abc import Sequence
from html import escape

from fusewright_bench.report.charts import Axis, Chart, Series

WIDTH, HEIGHT = 520, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 24, 40
_LEGEND_LINE = 16
SERIES_COLOURS = 6  # the classes s1 to s6 of the page
_SHAPES = ("circle", "square", "diamond", "triangle")  # so that no series is told by its colour alone


class _Scale:
    """From values to positions, on a logarithm."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = max(0.04 * (high - low), 0.05)
        self._low, self._high, self._start, self._end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Powers of ten; with fewer than three of them, 2 and 5 times them as well."""
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        inside = [power for power in powers if self._low <= power <= self._high]
        factors = (1,) if len(inside) >= 3 else (1, 2, 5)
        found = [factor * 10.0**power for power in powers for factor in factors]
        return [value for value in found if self._low <= math.log10(value) <= self._high]


def render(chart: Chart) -> str:
    """The chart as one element; what a point is stands in its tooltip."""
    everything = [*(point for one in chart.series for point in one.points), *chart.roof]
    height = HEIGHT + _LEGEND_LINE * len(chart.series)
    across = _Scale([point[0] for point in everything], _LEFT, WIDTH - _RIGHT)
    upwards = _Scale([point[1] for point in everything], HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(across, upwards, chart.x, chart.y)]
    if chart.roof:
        parts.append(f'<path class="roof" d="{_path(chart.roof, across, upwards)}"/>')
    for index, one in enumerate(chart.series):
        parts += _series(one, HEIGHT + _LEGEND_LINE * index, across, upwards)
    name = escape(chart.title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _grid(across: _Scale, upwards: _Scale, x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in across.ticks():
        at = f"{across(value):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(_text(across(value), HEIGHT - _BOTTOM + 15, x.text(value), "middle"))
    for value in upwards.ticks():
        at = f"{upwards(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(_text(_LEFT - 6, upwards(value) + 4, y.text(value), "end"))
    parts.append(_text((_LEFT + WIDTH) / 2, HEIGHT - 8, x.title, "middle"))
    parts.append(_text(4, 12, y.title, "start"))
    return parts


def _series(series: Series, legend_y: int, across: _Scale, upwards: _Scale) -> list[str]:
    parts = [f'<g class="s{series.style % SERIES_COLOURS + 1}">']
    if series.line:
        parts.append(f'<path class="line" d="{_path(sorted(series.points), across, upwards)}"/>')
    for point, label in zip(series.points, series.labels, strict=True):
        parts.append(_mark(series.style, across(point[0]), upwards(point[1]), f"<title>{escape(label)}</title>"))
    parts.append(_mark(series.style, _LEFT, legend_y, ""))
    parts.append(_text(_LEFT + 10, legend_y + 4, series.name, "start") + "</g>")
    return parts


def _path(points: Sequence[tuple[float, float]], across: _Scale, upwards: _Scale) -> str:
    return "M" + "L".join(f"{across(x):.1f} {upwards(y):.1f}" for x, y in points)


def _mark(style: int, x: float, y: float, title: str) -> str:
    shape = _SHAPES[style % len(_SHAPES)]
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'
    corners = {
        "square": ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        "diamond": ((0, -4), (4, 0), (0, 4), (-4, 0)),
        "triangle": ((0, -4), (4, 3), (-4, 3)),
    }[shape]
    points = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in corners)
    return f'<polygon class="mark" points="{points}">{title}</polygon>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="soft" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
