"""Exit codes of the commands."""

OK, SLOWER_FOUND, USAGE, INTERRUPTED = 0, 1, 2, 130
