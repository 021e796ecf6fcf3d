"""Experiments that take longer than a benchmark: each prints its table and writes it to a file it is given."""
