"""Progress while a run lasts and its tables afterwards: with rich where it is installed, as plain text otherwise."""

import sys
from collections.abc import Sequence
from typing import TextIO

from fusewright_bench.report import table
from fusewright_bench.report.markdown import absence_lines, failed
from fusewright_bench.results import Results, Row
from fusewright_bench.verdicts import FASTER, SLOWER

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
except ImportError:
    RICH = False
else:
    RICH = True

_WIDE_FROM = 150  # columns that the full table needs
_STYLES = {FASTER: "green", SLOWER: "red", "FAILED": "bold red"}


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


class PlainProgress:
    """One line per group of rows."""

    def __init__(self, groups: int, stream: TextIO) -> None:
        self._groups = groups
        self._stream = stream

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def group_started(self, index: int, text: str, seconds_left: float) -> None:
        print(f"[{index + 1}/{self._groups}] {_minutes(seconds_left)}  {text}", file=self._stream, flush=True)

    def group_finished(self, rows: Sequence[Row]) -> None:
        pass


class RichProgress:
    """One bar. It is redrawn between groups only: a thread that redraws would take time from what is measured."""

    def __init__(self, groups: int, stream: TextIO) -> None:
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}  {task.description}"),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=groups, left="")

    def __enter__(self) -> "RichProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def group_started(self, index: int, text: str, seconds_left: float) -> None:
        self._progress.update(self._task, completed=index, description=text, left=_minutes(seconds_left), refresh=True)

    def group_finished(self, rows: Sequence[Row]) -> None:
        self._progress.advance(self._task)


def progress(groups: int) -> RichProgress | PlainProgress:
    """An observer of a run, to be entered for as long as the run lasts; writes to stderr."""
    stream = sys.stderr
    return RichProgress(groups, stream) if RICH and stream.isatty() else PlainProgress(groups, stream)


def show(results: Results) -> None:
    """Print one table per op, what failed and what was not measured."""
    stream = sys.stdout
    for op, rows in table.by_op(results.cases).items():
        if RICH:
            _show_rich(op, rows, stream)
        else:
            print(f"\n{op}\n{table.plain_table(table.titles(True), table.cells(rows, True))}", file=stream)
    for row in failed(results):
        print(f"failed: {row.op} {row.shape} {row.dtype} {row.mode} {row.label}: {row.failure}", file=stream)
    disturbed = table.note_lines(results.cases)
    if disturbed:
        print(f"disturbed (marked ~): {len(disturbed)} notes, in the reports; the first: {disturbed[0]}", file=stream)
    for line in absence_lines(results):
        print(f"not measured: {line}", file=stream)


def show_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print any table as plain text."""
    print(table.plain_table(header, lines))


def _show_rich(op: str, rows: Sequence[Row], stream: TextIO) -> None:
    # Into a file or a pipe there is no width to fit: nothing is cut.
    console = Console(file=stream) if stream.isatty() else Console(file=stream, width=2 * _WIDE_FROM)
    wide = console.width >= _WIDE_FROM
    shown = Table(title=op, title_justify="left", title_style="bold")
    groups = len(table.GROUP_COLUMNS)
    for index, title in enumerate(table.titles(wide)):
        shown.add_column(title, justify="left" if index <= groups else "right", no_wrap=True)
    lines = table.cells(rows, wide)
    for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
        last_of_group = index + 1 == len(rows) or rows[index + 1].case_key != row.case_key
        styled = [f"[{_STYLES[text]}]{text}[/]" if text in _STYLES else text.replace("[", r"\[") for text in line]
        shown.add_row(*styled, end_section=last_of_group)
    console.print(shown)
