"""``python -m fusewright_kernels.cuda_compile_check``: the CUDA kernels compile for every target and none spills.

Hopper's products must run on its tensor cores as they were written: not serialised, and as many as counted by hand.
Needs nvcc and no GPU; the machine code is looked into where there is a cuobjdump, of the CUDA toolkit or of Triton.
"""

import importlib.util
import re
import shutil
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


# Instructions of the tensor cores in the kernels of one source, once for packed sequences and once without. Forward:
# D / 16 for a tile of keys and 8 for one of values, each in the loop and beside it. Backward, a loop of five products:
# twice D / 16, twice Q / 16 for tiles of Q = 128 queries (D = 64) or 64, and 8 for the 128 keys.
_PRODUCTS = {
    ("forward", 64): 2 * 2 * (4 + 8),
    ("forward", 128): 2 * 2 * (8 + 8),
    ("backward", 64): 2 * (2 * 4 + 2 * 8 + 8),
    ("backward", 128): 2 * (2 * 8 + 2 * 4 + 8),
}
HOPPER_PRODUCTS = {
    f"attention_{direction}_{dtype}_{width}_sm90": products
    for (direction, width), products in _PRODUCTS.items()
    for dtype in ("bfloat16", "float16")
}
# ptxas's words where it has to wait after every product.
_SERIALISED = "wgmma.mma_async instructions are serialized"

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


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that Triton brings; None if there is neither."""
    triton = importlib.util.find_spec("triton")
    folders = list(triton.submodule_search_locations or ()) if triton is not None else []
    candidates = ["cuobjdump", *(f"{folder}/backends/nvidia/bin/cuobjdump" for folder in folders)]
    return next((found for candidate in candidates if (found := shutil.which(candidate))), None)


def hopper_faults(source: str, machine_code: str) -> list[str]:
    """What is wrong with the products and tensor copies of one Hopper source's machine code."""

    def count(instruction: str) -> int:
        return len(re.findall(rf"\s{instruction}\b", machine_code))

    expected = HOPPER_PRODUCTS[source]
    faults = [f"{name} {count(name)}, expected none" for name in ("HMMA", "LDL", "STL") if count(name)]
    if count("HGMMA") != expected:
        faults.append(f"HGMMA {count('HGMMA')}, expected {expected}")
    if not count("UTMALDG"):
        faults.append("no UTMALDG")
    return faults


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
    faults: list[str] = []
    disassembler = cuobjdump()
    with tempfile.TemporaryDirectory() as folder:
        for step in recipe.compilations:
            try:
                report = compile_source(step, Path(folder))
            except subprocess.CalledProcessError as error:
                print(error.stdout, error.stderr, sep="\n", file=sys.stderr)
                return 1
            found = parse(step.source.name, report)
            print(f"{step.source.name}: {len(found)} kernels")
            usages += found
            if _SERIALISED in report:
                faults.append(f"{step.source.name}: {_SERIALISED}")
            if step.source.stem in HOPPER_PRODUCTS and disassembler is not None:
                command = [disassembler, "--dump-sass", str(Path(folder) / step.object_name)]
                code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                faults += [f"{step.source.name}: {fault}" for fault in hopper_faults(step.source.stem, code)]
    for fault in faults:
        print(fault, file=sys.stderr)
    spilling = [usage for usage in usages if usage.spill_bytes]
    for usage in spilling:
        print(f"SPILL {usage}", file=sys.stderr)
    worst = max((usage.registers for usage in usages), default=0)
    targets = ", ".join(toolchain.cuda_architectures())
    print(f"{len(usages)} kernels for {targets}: {len(spilling)} spill, at most {worst} registers")
    return 1 if spilling or faults or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
