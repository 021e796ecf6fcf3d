"""Fusewright behind the functions and modules of other libraries."""
