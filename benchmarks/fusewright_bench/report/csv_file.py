"""A run as CSV: one line per row, every field of :class:`fusewright_bench.results.Row` a column."""

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path

from fusewright_bench.results import Results, Row


def write(results: Results, path: Path) -> None:
    """Write the rows; lists and dictionaries as JSON, nothing where a value is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        names = [field.name for field in fields(Row)]
        writer.writerow(names)
        for row in results.cases:
            values = asdict(row)
            writer.writerow(
                json.dumps(values[name]) if isinstance(values[name], list | dict) else values[name] for name in names
            )
