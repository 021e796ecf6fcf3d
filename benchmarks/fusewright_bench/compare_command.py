"""``fusewright compare``: what changed between two result files."""

import argparse
import sys

from fusewright_bench import compare as comparison
from fusewright_bench.exit_codes import OK, SLOWER_FOUND, USAGE
from fusewright_bench.report import json_file, table, terminal


def compare(options: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    try:
        before, after = json_file.read(options.before), json_file.read(options.after)
    except json_file.ResultFileError as error:
        return _refuse(str(error))
    found = comparison.changes(before, after)
    if not found:
        return _refuse(f"{options.before} and {options.after} have no case in common")
    differences = comparison.mismatches(before, after)
    if options.fail_on and any(difference.other_machine for difference in differences):
        reasons = "; ".join(difference.text for difference in differences if difference.other_machine)
        return _refuse(f"--fail-on needs two runs of one machine: {reasons}")
    lines = comparison.lines(found)
    notes = [difference.text for difference in differences] + comparison.unpaired(before, after)
    for note in notes:
        print(note)
    terminal.show_table(comparison.HEADER, lines)
    print(comparison.summary(found))
    if options.markdown:
        parts = [comparison.summary(found), *(f"- {note}" for note in notes)]
        text = "\n".join(parts) + f"\n\n{table.markdown_table(comparison.HEADER, lines)}\n"
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")
    return SLOWER_FOUND if comparison.any_slower(found) and options.fail_on else OK


def _refuse(reason: str) -> int:
    print(f"fusewright compare: {reason}", file=sys.stderr)
    return USAGE
