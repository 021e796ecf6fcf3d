"""``python -m fusewright_kernels.build``: build the compiled libraries now rather than on first use.

A library that this machine has no compiler for is reported and is no failure; one that fails to compile is.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from fusewright_kernels import build_cache, toolchain
from fusewright_kernels.build_cache import BuildError
from fusewright_kernels.toolchain import ToolchainError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusewright_kernels.build", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="LIBRARY", help=f"of {', '.join(toolchain.LIBRARIES)}")
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER", help="also copy them here, for a release wheel")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.names) - set(toolchain.LIBRARIES)
    if unknown:
        parser.error(f"LIBRARY is {', '.join(sorted(unknown))}, expected of {', '.join(toolchain.LIBRARIES)}")
    built: dict[str, Path] = {}
    failed = False
    for_users = [name for name in toolchain.LIBRARIES if name not in toolchain.TEST_LIBRARIES]
    for name in arguments.names or for_users:
        try:
            built[name] = build_cache.path_of(name)
            print(f"{name}: {built[name]}")
        except BuildError as error:
            missing_compiler = isinstance(error.__cause__, ToolchainError)
            failed |= not missing_compiler
            print(f"{name}: {'not built, ' if missing_compiler else ''}{error}", file=sys.stderr)
    if arguments.prebuilt is not None:
        _copy(built, arguments.prebuilt)
    return 1 if failed else 0


def _copy(built: dict[str, Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The host module is bound to one Python version and serves measuring only, so a wheel for all does without it.
    portable = {name: path for name, path in built.items() if name != "host"}
    for path in portable.values():
        shutil.copy2(path, folder / path.name)
    (folder / "manifest.json").write_text(json.dumps({name: path.name for name, path in portable.items()}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
