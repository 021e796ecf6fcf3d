"""Exit codes of the commands."""

OK, SLOWER_FOUND, USAGE, BROKEN, INTERRUPTED = 0, 1, 2, 3, 130
