"""``make new OP=name``: the skeleton of an op, with what is left to write named in each file.

It creates the op's folder, its test and its README; the schema goes into ``library/`` by hand, since it is the one
place that lists them all. CONTRIBUTING.md walks through the steps.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

REFERENCE = '''"""{title} as plain PyTorch: oracle in float64, naive baseline, last fallback."""

from torch import Tensor


def {op}(input: Tensor) -> Tensor:
    """The formula, in differentiable operations, computed in at least float32 and rounded once."""
    raise NotImplementedError("write the plain formula of {op}")
'''

OP = '''"""{title}: checks, dispatch, autograd."""

from torch import Tensor

from fusewright_kernels import dispatch
from fusewright_kernels.checks import floating_tensor
from fusewright_kernels.{op} import reference

dispatch.register("{op}", {{}})


def {op}(input: Tensor, *, backend: str | None = None) -> Tensor:
    """See :func:`fusewright.functional.{op}`."""
    floating_tensor("input", input)
    dispatch.choose("{op}", input.device.type, (input.dtype,), input.ndim, backend)
    return reference.{op}(input)
'''

README = """# {title}

## Mathematics

## Bytes and FLOPs

## Numerics

## Results

| predicted | changed | measured |
|---|---|---|
"""

TEST = '''"""{title} against its float64 oracle."""

import torch

from fusewright_kernels.{op} import reference
from fusewright_kernels.{op}.op import {op}


def test_matches_the_oracle() -> None:
    x = torch.randn(5, 37)
    torch.testing.assert_close({op}(x).double(), reference.{op}(x.double()), rtol=1e-5, atol=1e-5)
'''


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not re.fullmatch(r"[a-z][a-z0-9_]*", arguments[0]):
        print(f"OP is {' '.join(arguments) or 'absent'}, expected one name in snake case: make new OP=name")
        return 2
    op = arguments[0]
    folder = ROOT / "kernels/fusewright_kernels" / op
    if folder.exists():
        print(f"{folder.relative_to(ROOT)} exists already")
        return 1
    words = {"op": op, "title": op.replace("_", " ").capitalize()}
    files = {
        folder / "__init__.py": "",
        folder / "reference.py": REFERENCE,
        folder / "op.py": OP,
        folder / "README.md": README,
        ROOT / "tests" / f"test_{op}.py": TEST,
    }
    folder.mkdir()
    for path, text in files.items():
        path.write_text(text.format(**words))
        print(path.relative_to(ROOT))
    print("next: its schema in kernels/fusewright_kernels/library/, its package in pyproject.toml (CONTRIBUTING.md)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
