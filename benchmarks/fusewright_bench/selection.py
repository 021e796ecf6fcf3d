"""Which cases a command line asks for."""

import difflib
from collections.abc import Iterable, Sequence

import torch

from fusewright_bench.case import DTYPES, MODES, SUITES, Case, Operation, Shape
from fusewright_bench.cases import OPERATIONS

_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
DEFAULT_DTYPES = ("float32", "bfloat16")
DEFAULT_MODES = ("fwd", "both")
EVERY_PROVIDER = "all"
SCALING = "scaling"
FULL = "full"  # every shape, and every provider unless some are named


class UsageError(ValueError):
    """A name on the command line that nothing has."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for ``name``, with what it was most likely meant to be."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return UsageError(f"{kind} is {name!r}, {hint}")


def cases(
    suite: str | None = None,
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    modes: Sequence[str] = (),
) -> list[Case]:
    """The cases of ``suite``, or of the named shapes where those are given; an empty choice means the default.

    Raises:
        UsageError: a name is unknown; the message offers the nearest ones.
    """
    for op in ops:
        if op not in OPERATIONS:
            raise unknown("--op", op, OPERATIONS)
    for mode in modes:
        if mode not in MODES:
            raise unknown("--mode", mode, MODES)
    if suite is not None and suite not in SUITES:
        raise unknown("--suite", suite, SUITES)
    operations = [operation for name, operation in OPERATIONS.items() if not ops or name in ops]
    chosen = {operation.name: _shapes_of(operation, suite, shapes) for operation in operations}
    for text in shapes:
        if not any(shape.name == text for found in chosen.values() for shape in found):
            raise unknown("--shape", text, (shape.name for operation in operations for shape in operation.shapes))
    return [
        Case(operation, shape, dtype, mode)
        for operation in operations
        for shape in chosen[operation.name]
        for dtype in _dtypes(dtypes or DEFAULT_DTYPES)
        for mode in modes or DEFAULT_MODES
        if mode in operation.modes
    ]


def check_providers(
    names: Sequence[str], backends: Sequence[str], chosen: Sequence[Case], device: torch.device
) -> None:
    """Raise ``UsageError`` for a provider or a backend that no chosen case has."""
    operations = {case.operation.name: case.operation for case in chosen}.values()
    available = [provider for operation in operations for provider in operation.providers(device)]
    for option, given, known in (
        ("--provider", names, {EVERY_PROVIDER, *(provider.name for provider in available)}),
        ("--backend", backends, {provider.backend for provider in available}),
    ):
        for name in given:
            if name not in known:
                raise unknown(option, name, known)


def _shapes_of(operation: Operation, suite: str | None, names: Sequence[str]) -> list[Shape]:
    """The operation's shapes among ``names``; without names, those of the suite."""
    if names:
        return [shape for name in names if (shape := operation.shape(name)) is not None]
    if suite == SCALING:
        grown = [shape for growth in operation.scaling for shape in growth.shapes]
        return list({shape.name: shape for shape in grown}.values())
    if suite == FULL:
        return list(operation.shapes)
    return [shape for shape in operation.shapes if (suite or SUITES[0]) in shape.suites]


def _dtypes(names: Sequence[str]) -> list[torch.dtype]:
    full = [_DTYPE_ALIASES.get(name, name) for name in names]
    for name in full:
        if name not in DTYPES:
            raise unknown("--dtype", name, DTYPES)
    return [DTYPES[name] for name in full]
