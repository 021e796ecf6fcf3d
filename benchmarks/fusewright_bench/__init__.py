"""The benchmark suite: every kernel against the plain formula, torch and its peers, on this machine."""
