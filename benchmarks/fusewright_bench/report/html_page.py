"""A run as one self-contained HTML page: no other file, no network, readable without its script."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from fusewright_bench import scaling
from fusewright_bench.report import limits, svg, table
from fusewright_bench.report.charts import Chart, roofline_charts, scaling_charts
from fusewright_bench.report.markdown import absence_lines, baseline_text
from fusewright_bench.results import COPY, Results, Row
from fusewright_bench.verdicts import FASTER, SAME, SLOWER, UNCLEAR

_PAGE = Path(__file__).with_name("page")
_FILTERS = ("op", "dtype", "mode", "threads", "provider", "verdict")


class _Column(NamedTuple):
    title: str
    name: str  # of the value to sort by
    explanation: str


_NUMBERS = (
    _Column("time", "time_us", "median over interleaved rounds"),
    _Column("speed-up", "ratio", "over the baseline, paired within rounds, with its 95 % interval"),
    _Column("verdict", "verdict", "from the whole interval of the speed-up"),
    _Column("GB/s", "gbps", "the least bytes over the time"),
    _Column("GFLOP/s", "tflops", "the least operations over the time"),
    _Column("roof %", "roofline_percent", "the least possible time on this machine over the time"),
    _Column("limit", "roofline_limit", "what sets the least possible time, and where the operands fit"),
    _Column("error u", "error_u", "against float64, in units of the dtype"),
    _Column("vs torch", "error_ratio", "error over that of the baseline"),
    _Column("memory", "peak_memory_bytes", "peak of one call beyond its inputs"),
    _Column("resident", "peak_resident_bytes", "growth of the process during one call"),
    _Column("host us", "host_overhead_us", "one call on a tiny input"),
    _Column("first ms", "first_call_ms", "the first call, compilation included"),
    _Column("compile ms", "compile_ms", "the first call beyond a later one"),
)


def write(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results), encoding="utf-8")


def render(results: Results) -> str:
    """The whole page."""
    environment = results.environment
    return Template((_PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"fusewright on {environment.get('device')}"),
        lead=escape(results.command),
        facts=_definitions(_facts(results)),
        notices=_notices(results),
        summary=_summary(results),
        filters=_filters(results.cases),
        tables="".join(_group(op, rows) for op, rows in table.by_op(results.cases).items()),
        legend=escape(table.LEGEND.format(baseline=baseline_text(results))),
        charts=_charts(results),
        environment=f'<dl class="environment">{_definitions(environment.items())}</dl>',
        style=(_PAGE / "style.css").read_text(encoding="utf-8").rstrip(),
        script=(_PAGE / "page.js").read_text(encoding="utf-8").rstrip(),
    )


def _definitions(pairs: Iterable[tuple[str, object]]) -> str:
    return "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_plain_text(value))}</dd></div>"
        for name, value in pairs
    )


def _plain_text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(_plain_text, value)) or "none"
    return "unknown" if value is None else str(value)


def _facts(results: Results) -> list[tuple[str, object]]:
    environment = results.environment
    versions = environment.get("versions", {})
    return [
        ("processor", f"{environment.get('cpu_model')}, {environment.get('cores')} cores"),
        ("kernels for", environment.get("isa") or "nothing this machine has"),
        ("torch", versions.get("torch")),
        ("commit", (environment.get("commit") or "unknown")[:12]),
    ]


def _notices(results: Results) -> str:
    told = []
    if not results.complete:
        told.append("The run was interrupted: these are the cases that were done by then.")
    failures = [row for row in results.cases if row.failure]
    if failures:
        told.append(f"Failed rows: {len(failures)}; their reasons stand in the table.")
    return "".join(f'<p class="notice" role="status">{escape(text)}</p>' for text in told)


def _summary(results: Results) -> str:
    """How often our kernels are faster than the baseline, per op, and what was not measured."""
    header = ("op", "cases", FASTER, SAME, UNCLEAR, SLOWER, "typical speed-up", "worst", "best")
    lines = []
    for op, rows in table.by_op(results.cases).items():
        judged = [row for row in rows if row.provider == "fusewright" and row.ratio]
        if judged:
            ratios = sorted(row.ratio or 0.0 for row in judged)
            counts = [sum(row.verdict == name for row in judged) for name in (FASTER, SAME, UNCLEAR, SLOWER)]
            spread = [f"{ratio:.2f}x" for ratio in (ratios[len(ratios) // 2], ratios[0], ratios[-1])]
            lines.append([op, str(len(judged)), *map(str, counts), *spread])
    absent = "".join(f"<li>{escape(line)}</li>" for line in absence_lines(results))
    parts = []
    if lines:
        parts.append(_plain_table("Our kernels against the baseline", header, lines))
    measured = _plain_table("Measured in this run", limits.HEADER, limits.lines(results))
    parts.append(f"<details><summary>Limits of this machine</summary>{measured}</details>")
    if absent:
        parts.append(f'<details><summary>Not measured</summary><ul class="note">{absent}</ul></details>')
    return "".join(parts)


def _plain_table(caption: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col"{_align(index)}>{escape(title)}</th>' for index, title in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{_align(index)}>{escape(text)}</td>" for index, text in enumerate(line)) + "</tr>"
        for line in lines
    )
    table_of = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return _scrolling(caption, f"<table>{table_of}</table>")


def _scrolling(name: str, content: str) -> str:
    """A wide table scrolls by itself, also by keyboard; the page does not."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{content}</div>'


def _align(index: int) -> str:
    return ' class="text"' if index == 0 else ""


def _filters(rows: Sequence[Row]) -> str:
    parts = []
    for name in _FILTERS:
        values = dict.fromkeys(_filter_values(row)[name] for row in rows)
        options = "".join(f"<option>{escape(value)}</option>" for value in values if value)
        parts.append(f'<label>{name} <select name="{name}"><option value="">all</option>{options}</select></label>')
    return "".join(parts)


def _filter_values(row: Row) -> dict[str, str]:
    return {
        "op": row.op,
        "dtype": row.dtype,
        "mode": row.mode,
        "threads": str(row.threads),
        "provider": row.label,
        "verdict": _verdict(row),
    }


def _verdict(row: Row) -> str:
    if row.failure:
        return "FAILED"
    return "" if row.provider == row.baseline else row.verdict or ""


def _group(op: str, rows: Sequence[Row]) -> str:
    columns = [("shape", True), ("dtype", True), ("mode", True), ("thr", False), ("provider", True)]
    head = "".join(_header(title, text) for title, text in columns)
    head += "".join(_header(column.title, False, column.explanation) for column in _NUMBERS)
    head += '<th scope="col">command</th><th scope="col" class="text">note</th>'
    starts = [index == 0 or rows[index - 1].case_key != row.case_key for index, row in enumerate(rows)]
    body = "".join(_row(row, starts_a_case) for row, starts_a_case in zip(rows, starts, strict=True))
    results = f'<table class="results"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="group"><h3>{escape(op)}</h3>{_scrolling(op, results)}</div>'


def _header(title: str, text: bool, explanation: str = "") -> str:
    told = f' title="{escape(explanation)}"' if explanation else ""
    kind = ' class="text"' if text else ""
    return f'<th scope="col"{kind}><button type="button"{told}>{escape(title)}</button></th>'


def _row(row: Row, first: bool) -> str:
    kinds = [name for name, holds in (("first", first), ("ours", row.provider.startswith("fusewright"))) if holds]
    data = "".join(f' data-{name}="{escape(value)}"' for name, value in _filter_values(row).items())
    cells = [
        _cell(row.shape, kind="text"),
        _cell(row.dtype, kind="text"),
        _cell(table.mode_text(row), kind="text"),
        _cell(str(row.threads)),
        _cell(row.label, kind="text provider"),
        *(_figure_cell(row, column.name) for column in _NUMBERS),
        f'<td><button type="button" class="copy" data-command="{escape(row.reproduce)}"'
        f' aria-label="copy the command for {escape(row.label)} on {escape(row.shape)}">copy</button></td>',
        _cell("; ".join(_notes(row)), kind="detail"),
    ]
    return f'<tr class="{" ".join(kinds)}"{data}>{"".join(cells)}</tr>'


def _notes(row: Row) -> list[str]:
    if row.failure:
        return [row.failure]
    percentiles = row.percentiles_us or {}
    return [*(f"{name} {table.time_text(value)}" for name, value in percentiles.items() if name != "p50"), *row.notes]


def _cell(text: str, *, sort: object = None, kind: str = "") -> str:
    attributes = f' class="{kind}"' if kind else ""
    if sort is not None:
        attributes += f' data-sort="{escape(str(sort))}"'
    return f"<td{attributes}>{escape(text)}</td>"


def _figure_cell(row: Row, name: str) -> str:
    if name == "verdict":
        return _cell(_verdict(row), kind=f"verdict {_verdict(row).lower()}")
    value = getattr(row, name)
    return _cell(_text(row, name), sort="" if value is None else value)


def _text(row: Row, name: str) -> str:
    value = getattr(row, name)
    if value is None:
        return ""
    if name == "time_us":
        return table.time_text(value)
    if name == "ratio":
        return table.ratio_text(row)
    if name in ("peak_memory_bytes", "peak_resident_bytes"):
        return table.bytes_text(value)
    if name == "tflops":
        return table.significant(value * 1e3) if row.provider != COPY else ""
    if name == "roofline_limit":
        return f"{value} ({row.memory_level})" if value == "memory" and row.memory_level else value
    if name == "error_u":
        return table.error_text(row)
    return table.significant(value)


def _charts(results: Results) -> str:
    lines = scaling.lines(results)
    growth = _plain_table("Growth along each axis", scaling.HEADER, lines) if lines else ""
    sections = [
        ("Scaling", growth, scaling_charts(results)),
        ("Roofline", "", roofline_charts(results)),
    ]
    parts = []
    for title, text, charts in sections:
        figures = "".join(_figure(chart) for chart in charts)
        if figures:
            parts.append(f'<section><h2>{title}</h2>{text}<div class="charts">{figures}</div></section>')
    return "".join(parts)


def _figure(chart: Chart) -> str:
    caption = f"<strong>{escape(chart.title)}.</strong> {escape(chart.caption)}"
    return f"<figure>{svg.render(chart)}<figcaption>{caption}</figcaption></figure>"
