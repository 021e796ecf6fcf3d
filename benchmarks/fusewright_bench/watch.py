"""What a run is doing at this moment, told to the process that watches over it."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fusewright_bench.results import Row


class Watch:
    """Told before every step that may never return; this one tells nobody."""

    def step(self, row: Row) -> None:
        """The provider of ``row`` is about to run."""

    def rest(self) -> None:
        """No provider is running."""


class FileWatch(Watch):
    """Keeps the step and its start at the beginning of a file, in microseconds: it can be told of every sample."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT)
        self._longest = 0

    def step(self, row: Row) -> None:
        self._write({"since": time.monotonic(), "row": asdict(row)})

    def rest(self) -> None:
        self._write({})

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self._longest = max(self._longest, len(text))
        os.pwrite(self._file, text.ljust(self._longest), 0)


class Step(NamedTuple):
    row: Row
    since: float  # of time.monotonic, which all processes of a machine share


def read_step(path: Path) -> Step | None:
    """The step that :class:`FileWatch` wrote to ``path``; None where no provider is running."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # empty, or caught half-written: the next look will tell
        return None
    return Step(Row(**content["row"]), content["since"]) if content else None
