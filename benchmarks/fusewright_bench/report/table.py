"""The table of a run as text, shared by the terminal and Markdown."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fusewright_bench.results import Row

ABSENT = "-"
NOISY = " ~"  # behind a time that something disturbed


def time_text(microseconds: float | None) -> str:
    """Three significant digits in the unit that fits."""
    if microseconds is None:
        return ABSENT
    for factor, unit in ((1.0, "us"), (1e3, "ms")):
        if microseconds < 1e3 * factor:
            return f"{significant(microseconds / factor)} {unit}"
    return f"{significant(microseconds / 1e6)} s"


def bytes_text(count: int | None) -> str:
    if count is None:
        return ABSENT
    for factor, unit in ((1, "B"), (1 << 10, "KiB"), (1 << 20, "MiB")):
        if count < factor << 10:
            return f"{significant(count / factor)} {unit}"
    return f"{significant(count / (1 << 30))} GiB"


def threads_text(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent; a larger number keeps its integer part."""
    if value is None:
        return ABSENT
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    exponent = int(f"{value:e}".partition("e")[2])
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def mode_text(row: Row) -> str:
    return row.mode if row.cache == "warm" else f"{row.mode} {row.cache}"


def ratio_text(row: Row) -> str:
    if row.ratio is None or row.interval is None:
        return ABSENT
    if row.provider == row.baseline:
        return "baseline"
    return f"{row.ratio:.2f}x [{row.interval[0]:.2f}, {row.interval[1]:.2f}]"


def _verdict_text(row: Row) -> str:
    if row.failure is not None:
        return "FAILED"
    return ABSENT if row.verdict is None or row.provider == row.baseline else row.verdict


def _roofline_text(row: Row) -> str:
    if row.roofline_percent is None:
        return ABSENT
    return f"{row.roofline_percent:.0f}" + (f" ({row.roofline_limit})" if row.roofline_limit != "memory" else "")


def error_text(row: Row) -> str:
    mark = " over budget" if row.within_budget is False else ""
    return significant(row.error_u) + mark


class Column(NamedTuple):
    title: str
    text: Callable[[Row], str]
    wide_only: bool = False


# What a group of rows has in common comes first and is printed once per group.
GROUP_COLUMNS = (
    Column("shape", lambda row: row.shape),
    Column("dtype", lambda row: row.dtype),
    Column("mode", mode_text),
    Column("thr", lambda row: str(row.threads)),
)
COLUMNS = (
    Column("provider", lambda row: row.label),
    Column("time", lambda row: time_text(row.time_us) + (NOISY if row.notes else "")),
    Column("speed-up [95 %]", ratio_text),
    Column("verdict", _verdict_text),
    Column("GB/s", lambda row: significant(row.gbps)),
    Column("roof %", _roofline_text),
    Column("error u", error_text),
    Column("vs torch", lambda row: ABSENT if row.error_ratio is None else f"{row.error_ratio:.2f}", wide_only=True),
    Column("memory", lambda row: bytes_text(row.peak_memory_bytes), wide_only=True),
    Column("host us", lambda row: significant(row.host_overhead_us), wide_only=True),
    Column("first ms", lambda row: significant(row.first_call_ms), wide_only=True),
)


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by op, both in the order they were measured in."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.op, []).append(row)
    return grouped


def titles(wide: bool) -> list[str]:
    return [column.title for column in GROUP_COLUMNS + columns(wide)]


def columns(wide: bool) -> tuple[Column, ...]:
    return COLUMNS if wide else tuple(column for column in COLUMNS if not column.wide_only)


def cells(rows: Sequence[Row], wide: bool) -> list[list[str]]:
    """One list of texts per row, under :func:`titles`."""
    lines = []
    previous = None
    for row in rows:
        head = [column.text(row) if row.case_key != previous else "" for column in GROUP_COLUMNS]
        previous = row.case_key
        lines.append(head + [column.text(row) for column in columns(wide)])
    return lines


def plain_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces: the first to the left, where names stand, numbers to the right."""
    table = [list(header), *map(list, lines)]
    widths = [max(len(line[index]) for line in table) for index in range(len(header))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in (header, rule, *lines))


def note_lines(rows: Iterable[Row]) -> list[str]:
    """What disturbed each group of rows, once per group, and which of its rows alone."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            group = f"{row.op} {row.shape} {row.dtype} {row.mode}, {threads_text(row.threads)}: {note}"
            lines.setdefault(group, []).append(row.label)
    return [f"{group} ({', '.join(labels)})" if "its rounds" in group else group for group, labels in lines.items()]


LEGEND = (
    "Time is the median over interleaved rounds. Speed-up is over {baseline}, paired within each round, with its 95 % "
    "bootstrap interval; FASTER, SAME and SLOWER need the whole interval above 1.03, within 0.97 to 1.03, or below "
    "0.97, all else is UNCLEAR. Roof is the least possible time here over the time: the least by a copy of the same "
    "bytes, timed in the same rounds, or by the measured rate of matrix products where (compute) is said, of "
    "exponentials where (exp) is. Error is against float64 in units u (float32 2^-24, bfloat16 2^-9, float16 2^-12); "
    "vs torch is its quotient to the baseline's. Memory is the peak of one call beyond its inputs. A time marked ~ was "
    "disturbed: the notes say by what."
)
