"""``python -m fusewright_bench`` is the command ``fusewright``."""

from fusewright_bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
