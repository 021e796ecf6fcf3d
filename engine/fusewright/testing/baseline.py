"""The measured errors kept per device, and the comparison with them.

The file holds, under a schema and a cases version, ``errors[platform][case id][result] = error in u``. A platform is
"device kind/backend/instruction set": another one sums in another order and has its own errors.
"""

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fusewright.testing.cases import CASES_VERSION

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).with_name("baseline.json")

REGRESSION_FACTOR = 1.5
REGRESSION_FLOOR = 0.25
"""An error above 1.5 times the kept one plus 0.25u is a regression; library versions move it by less."""

Errors = dict[str, dict[str, float]]


class BaselineError(ValueError):
    """The file is not one that this version can read or write."""


@dataclass
class Baseline:
    """Kept errors by platform."""

    errors: dict[str, Errors] = field(default_factory=dict)

    def knows(self, platform: str) -> bool:
        return platform in self.errors

    def kept(self, platform: str, case_id: str, result: str) -> float | None:
        return self.errors.get(platform, {}).get(case_id, {}).get(result)

    def keep(self, platform: str, case_id: str, result: str, error: float) -> None:
        self.errors.setdefault(platform, {}).setdefault(case_id, {})[result] = float(f"{error:.3g}")


def regressed(error: float, kept: float | None) -> bool:
    """Whether ``error`` is worse than the ``kept`` one; nothing kept is no regression."""
    return kept is not None and not error <= REGRESSION_FACTOR * kept + REGRESSION_FLOOR


def load(path: Path) -> Baseline:
    """Read a baseline; a file that does not exist is an empty one.

    Raises:
        BaselineError: the file is damaged, or of another schema or cases version.
    """
    if not path.exists():
        return Baseline()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaselineError(f"baseline is {path}, expected readable JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("errors"), dict):
        raise BaselineError(f"baseline is {path}, expected a JSON object with 'errors'")
    for name, expected in (("schema_version", SCHEMA_VERSION), ("cases_version", CASES_VERSION)):
        if content.get(name) != expected:
            raise BaselineError(f"{name} in {path} is {content.get(name)}, expected {expected}")
    return Baseline(content["errors"])


def save(baseline: Baseline, path: Path) -> None:
    """Write ``baseline`` with one line per case, so that a change of one shows as one line; all of it or nothing."""
    lines = ["{", f' "schema_version": {SCHEMA_VERSION},', f' "cases_version": {CASES_VERSION},', ' "errors": {']
    platforms = sorted(baseline.errors)
    for platform in platforms:
        lines.append(f"  {json.dumps(platform)}: {{")
        cases = baseline.errors[platform]
        rows = [f"   {json.dumps(case)}: {json.dumps(cases[case])}" for case in sorted(cases)]
        lines.append(",\n".join(rows))
        lines.append("  }" + ("" if platform == platforms[-1] else ","))
    lines += [" }", "}", ""]
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write("\n".join(lines))
        os.replace(temporary, path)
    except OSError as error:
        raise BaselineError(f"baseline is {path}, expected a path that can be written: {error}") from error
