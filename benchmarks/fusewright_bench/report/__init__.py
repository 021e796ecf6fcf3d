"""What a run looks like: a terminal table, a Markdown report, a JSON file."""
