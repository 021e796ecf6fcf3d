"""``python -m fusewright_kernels.cuda_compile_check``: the CUDA kernels compile for every target and none spills.

Needs nvcc and no GPU. The compiler's resource report is read from the build's log, so the check costs nothing after
``make build``.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from fusewright_kernels import toolchain
from fusewright_kernels.toolchain import Compilation, ToolchainError


class Usage(NamedTuple):
    """What ptxas says of one kernel for one target."""

    source: str
    target: str
    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int


_FUNCTION = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def parse(source: str, report: str) -> list[Usage]:
    """The usage of every kernel in ptxas's verbose report on one source."""
    usages = []
    for match in _FUNCTION.finditer(report):
        spill_bytes = int(match["stores"]) + int(match["loads"])
        registers, stack_bytes = int(match["registers"]), int(match["stack"])
        usages.append(Usage(source, match["target"], match["kernel"], registers, stack_bytes, spill_bytes))
    return usages


def compile_source(step: Compilation, folder: Path) -> str:
    """ptxas's report on one source.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    command = [*step.command, "-c", str(step.source), "-o", str(folder / step.object_name)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def main() -> int:
    try:
        recipe = toolchain.LIBRARIES["cuda"]()
    except ToolchainError as error:
        print(f"CUDA kernels not checked: {error}")
        return 0
    usages: list[Usage] = []
    with tempfile.TemporaryDirectory() as folder:
        for step in recipe.compilations:
            try:
                found = parse(step.source.name, compile_source(step, Path(folder)))
            except subprocess.CalledProcessError as error:
                print(error.stdout, error.stderr, sep="\n", file=sys.stderr)
                return 1
            print(f"{step.source.name}: {len(found)} kernels")
            usages += found
    spilling = [usage for usage in usages if usage.spill_bytes]
    for usage in spilling:
        print(f"SPILL {usage}", file=sys.stderr)
    worst = max((usage.registers for usage in usages), default=0)
    targets = ", ".join(toolchain.cuda_architectures())
    print(f"{len(usages)} kernels for {targets}: {len(spilling)} spill, at most {worst} registers")
    return 1 if spilling or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
