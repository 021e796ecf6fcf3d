"""A run as Markdown, for a README or a pull request."""

from pathlib import Path

from fusewright_bench import scaling
from fusewright_bench.report import limits, table
from fusewright_bench.results import Results, Row


def render(results: Results) -> str:
    """The whole report: machine, limits, one table per op, failures, absent providers."""
    environment = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    isa = environment["isa"] or "no instruction set of this machine"
    state = "" if results.complete else "\n\n**Interrupted: the cases below are those done by then.**"
    parts = [
        f"# fusewright on {environment['device']}{state}",
        f"- command: `{results.command}`\n"
        f"- {environment['cpu_model']}, {environment['cores']} cores, kernels for {isa}\n"
        f"- {versions}, commit {environment['commit'] or 'unknown'}",
        table.LEGEND.format(baseline=baseline_text(results)),
    ]
    for op, rows in table.by_op(results.cases).items():
        parts += [f"## {op}", table.markdown_table(table.titles(wide=True), table.cells(rows, wide=True))]
    grown = scaling.lines(results)
    if grown:
        parts += ["## Growth", table.markdown_table(scaling.HEADER, grown)]
    failures = [f"- {row.op} {row.shape} {row.dtype} {row.mode} {row.label}: {row.failure}" for row in failed(results)]
    if failures:
        parts += ["## Failed", "\n".join(failures)]
    parts += [
        "## Limits of this machine, measured in this run",
        table.markdown_table(limits.HEADER, limits.lines(results)),
    ]
    disturbed = table.note_lines(results.cases)
    if disturbed:
        parts += ["## Disturbed", "\n".join(f"- {line}" for line in disturbed)]
    if results.absent:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in absence_lines(results))]
    return "\n\n".join(parts) + "\n"


def write(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results), encoding="utf-8")


def failed(results: Results) -> list[Row]:
    """One row per failed provider and case, whatever the thread count."""
    unique = {(row.op, row.shape, row.dtype, row.mode, row.label): row for row in results.cases if row.failure}
    return list(unique.values())


def absence_lines(results: Results) -> list[str]:
    return [
        f"{absence.provider}: {absence.reason}" + (f" (`{absence.install}`)" if absence.install else "")
        for absence in results.absent
    ]


def baseline_text(results: Results) -> str:
    return " or ".join(dict.fromkeys(row.baseline for row in results.cases if row.baseline)) or "the baseline"
