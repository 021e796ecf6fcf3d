"""A run as a JSON file with a versioned schema."""

import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusewright_bench.results import SCHEMA_VERSION, Absence, Results, Row, Study


class ResultFileError(ValueError):
    """A file is not a result of this suite, or of another version of it."""


def write(results: Results, path: Path) -> None:
    """Write ``results``, replacing ``path`` in one step so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(asdict(results)), indent=1, allow_nan=False)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path) -> Results:
    """The results in ``path``.

    Raises:
        ResultFileError: the file is missing, is not JSON, or has another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultFileError(f"{path} cannot be read as a result file: {error}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ResultFileError(f"{path}: schema_version is {version}, expected {SCHEMA_VERSION}; measure again")
    try:
        cases = [Row(**row) for row in document.pop("cases")]
        absent = [Absence(**absence) for absence in document.pop("absent")]
        studies = [Study(**study) for study in document.pop("studies", [])]
        return Results(cases=cases, absent=absent, studies=studies, **document)
    except (KeyError, TypeError) as error:
        raise ResultFileError(f"{path} does not follow schema_version {SCHEMA_VERSION}: {error}") from error


def _finite(value: Any) -> Any:
    """``value`` with None for every infinity and NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
