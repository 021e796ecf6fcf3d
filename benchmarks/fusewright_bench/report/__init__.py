"""What a run looks like: a terminal table, Markdown, an HTML page, charts, JSON and CSV."""
