"""``explain``: which kernel serves a call and why; ``doctor``: what this machine offers and what is missing."""

import argparse
import contextlib
import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from fusewright_kernels import build_cache, dispatch, native, toolchain, triton_support
from fusewright_kernels.build_cache import BuildError


@dataclass(frozen=True)
class Row:
    """One backend's answer to one call."""

    op: str
    backend: str
    serves: bool
    reason: str


class Explanation(list[Row]):
    """What :func:`explain` returns: a list of :class:`Row` that prints as a table."""

    def __str__(self) -> str:
        widths = (max((len(row.op) for row in self), default=2), 9)
        lines = [f"{'op':{widths[0]}}  {'backend':{widths[1]}}  serves  why"]
        lines += [
            f"{row.op:{widths[0]}}  {row.backend:{widths[1]}}  {'yes' if row.serves else 'no':6}  {row.reason}"
            for row in self
        ]
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Call ``function(*args, **kwargs)`` and tell, for every op of ours in it, which backend served and why.

    Returns:
        One row per op and backend down to the one that served, in the order of preference; prints as a table.
    """
    with dispatch.recording() as decisions:
        function(*args, **kwargs)
    rows = Explanation()
    for decision in decisions:
        op = decision.call.op
        rows += [Row(op, refusal.backend, False, refusal.reason) for refusal in decision.refusals]
        rows.append(Row(op, decision.backend, True, _why(decision)))
    return rows


def _why(decision: dispatch.Decision) -> str:
    if decision.forced:
        return "forced by the call or by FUSEWRIGHT_BACKEND"
    if decision.backend == "reference":
        return "float64 and meta tensors by design" if decision.by_design else "no kernel takes the call"
    if decision.backend == "torch":
        return "torch's own kernel: no fused kernel takes the call"
    if decision.backend == "cpu":
        return f"best of this machine, instruction set {native.cpu_isa()}"
    return "best of this machine"


def _library_status(reason: str | None) -> str:
    return "ready" if reason is None else reason


def _environment() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in ("torch", "triton", "fusewright"):
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "cuda of torch", str(torch.version.cuda)
    yield "gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none found by torch"
    for name, find in (("c++ compiler", toolchain.cxx_compiler), ("nvcc", toolchain.nvcc_compiler)):
        try:
            yield name, find()
        except toolchain.ToolchainError as error:
            yield name, str(error)
    for package, use in (("rich", "tables and progress"), ("matplotlib", "plots of a benchmark")):
        found = importlib.util.find_spec(package) is not None
        yield package, "installed" if found else f"not installed: {use} (pip install 'fusewright[bench]')"
    yield "cache", str(build_cache.directory())


def _self_tests() -> Iterator[tuple[str, str, bool]]:
    """(op and backend, outcome, passed) of a small call checked against the float64 formula."""
    from fusewright.small_calls import OPS, small_call
    from fusewright.testing import error_in_u

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in OPS:
        expected = small_call(op, torch.float64, device)(backend="reference")
        for backend in dispatch.BACKENDS:
            try:
                error = error_in_u(small_call(op, torch.float32, device)(backend=backend), expected)
            except ValueError as refusal:
                yield f"{op} {backend}", str(refusal), True
            else:
                yield f"{op} {backend}", f"error {error:.2f} u", error < 16.0


def doctor_main(argv: list[str]) -> int:
    """Print the environment, the libraries and a self-test of each op; 1 if a self-test fails."""
    argparse.ArgumentParser(prog="fusewright doctor", description="what this machine offers").parse_args(argv)
    rows = list(_environment())
    rows.append(("cpu kernels", _library_status(native.cpu_unavailable_reason())))
    if native.cpu_unavailable_reason() is None:
        rows.append(("cpu instruction sets", f"{', '.join(native.cpu_isas())}; in use: {native.cpu_isa()}"))
    rows.append(("cuda kernels", _library_status(native.cuda_unavailable_reason())))
    rows.append(("triton kernels", _library_status(triton_support.unavailable_reason())))
    with contextlib.suppress(BuildError):
        host = native.host()
        rows.append(("processors, caches", f"{host.usable_processors()}, {host.cache_sizes()}"))
    for name, value in rows:
        print(f"{name:22} {value}")
    failed = False
    for name, outcome, passed in _self_tests():
        print(f"{name:38} {outcome}{'' if passed else '  FAILED'}")
        failed |= not passed
    return 1 if failed else 0


def explain_main(argv: list[str]) -> int:
    """Print which backend serves a small call of an op on this machine."""
    from fusewright.small_calls import OPS, small_call

    parser = argparse.ArgumentParser(prog="fusewright explain", description="which kernel serves a call, and why")
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    print(explain(small_call(arguments.op, getattr(torch, arguments.dtype), arguments.device)))
    return 0
