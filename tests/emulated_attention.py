"""Emulated attention in tests: calls of its ops on CPU tensors, the oracle's answers, and mutants of its kernels."""

import ctypes
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import emulation_support
import torch
from torch import Tensor

from fusewright import testing
from fusewright_kernels import toolchain

NATIVE = Path(__file__).parent / "native"
LAUNCH_FAILURE = 719


class Limits(NamedTuple):
    """The keys that a query sees, as the op's numbers."""

    left: int = -1
    right: int = -1
    bottom_right: bool = False


NONE = Limits()


def inputs(
    dtype: torch.dtype, batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int
) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradient_like(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)


Offsets = tuple[Tensor | None, Tensor | None]
NOT_PACKED: Offsets = (None, None)


def forward(
    overload: str, tensors: Sequence[Tensor], limits: Limits = NONE, offsets: Offsets = NOT_PACKED
) -> tuple[Tensor, Tensor]:
    """Output and statistics."""
    function = getattr(torch.ops.fusewright.attention_forward, overload)
    return function(*tensors, *(None,) * 5, *offsets, 0, tensors[0].shape[3] ** -0.5, 0.0, 0.0, *limits)


def checked_forward(
    tensors: Sequence[Tensor], limits: Limits = NONE, offsets: Offsets = NOT_PACKED
) -> tuple[Tensor, Tensor]:
    """Output and statistics of the CUDA kernels, which are the oracle's."""
    output, statistics = forward("cuda", tensors, limits, offsets)
    oracle, oracle_statistics = forward("default", [tensor.double() for tensor in tensors], limits, offsets)
    testing.assert_accurate(output, oracle, budget=testing.budget_of(output.dtype))
    lse = [reference + total.log() for reference, total in (statistics, oracle_statistics)]
    torch.testing.assert_close(lse[0].double(), lse[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(output[oracle_statistics[1] == 0], torch.zeros_like(output[oracle_statistics[1] == 0]))
    return output, statistics


def backward(
    overload: str,
    grad_output: Tensor,
    results: tuple[Tensor, Tensor],
    tensors: Sequence[Tensor],
    limits: Limits = NONE,
    offsets: Offsets = NOT_PACKED,
    *,
    grad_lse: Tensor | None = None,
    ordered: bool = False,
) -> list[Tensor]:
    """Gradients of query, key and value from what :func:`forward` gave."""
    op = torch.ops.fusewright.attention_backward_ordered if ordered else torch.ops.fusewright.attention_backward
    numbers = (0, tensors[0].shape[3] ** -0.5, 0.0, 0.0, *limits)
    needed = (True, True, True, False, False)
    gradients = getattr(op, overload)(
        grad_output, grad_lse, *results, *tensors, *(None,) * 5, *offsets, *numbers, *needed
    )  # fmt: skip
    return list(gradients[:3])


class Oracle(NamedTuple):
    """Gradients of query, key and value in float64, and the sizes of their terms before they cancel."""

    gradients: list[Tensor]
    magnitudes: tuple[float, float, float]


def oracle_gradients(
    grad_output: Tensor,
    tensors: Sequence[Tensor],
    limits: Limits = NONE,
    offsets: Offsets = NOT_PACKED,
    *,
    grad_lse: Tensor | None = None,
) -> Oracle:
    grad, query, key, value = (tensor.double() for tensor in (grad_output, *tensors))
    results = forward("default", (query, key, value), limits, offsets)
    wide_lse = None if grad_lse is None else grad_lse.double()
    gradients = backward("default", grad, results, (query, key, value), limits, offsets, grad_lse=wide_lse)
    # Over values that are the identity, the output is the weights.
    identity = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:3], -1)
    weights, _ = forward("default", (query, key, identity), limits, offsets)
    group, scale = query.shape[1] // key.shape[1], query.shape[3] ** -0.5
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    delta = (grad * results[0]).sum(-1, keepdim=True)
    terms = weights.square() * ((grad @ value.mT).square() + delta.square())
    sizes = (terms @ key.square() * scale**2, terms.mT @ query.square() * scale**2, weights.square().mT @ grad.square())
    magnitudes = [testing.rms(size.sqrt()) for size in sizes]
    return Oracle(gradients, (magnitudes[0], magnitudes[1], magnitudes[2]))


def assert_gradients(actual: Sequence[Tensor], oracle: Oracle) -> None:
    for name, gradient, expected, magnitude in zip(("query", "key", "value"), actual, *oracle, strict=True):
        testing.assert_accurate(gradient, expected, "gradient", magnitude=magnitude, name=f"gradient of {name}")


class Change(NamedTuple):
    """A text of a source under csrc, and what takes its place."""

    path: str
    before: str
    after: str


def compile_mutant(folder: Path, source: str, changes: Sequence[Change]) -> ctypes.CDLL:
    """``source`` of tests/native, compiled for the emulator with the changed kernels."""
    root = folder / "csrc"
    for name in ("include", "cuda"):
        shutil.copytree(toolchain.source_root() / name, root / name)
    for change in changes:
        text = (root / change.path).read_text()
        assert change.before in text, change
        (root / change.path).write_text(text.replace(change.before, change.after))
    includes = [root / "include", root / "cuda" / "attention"]
    return emulation_support.compile_for_emulator(NATIVE / source, folder / "mutant.so", includes)


class Fault(NamedTuple):
    """A statement or an expression of a source in csrc/cuda/attention, and what takes its place."""

    path: str
    before: str
    after: str
    # What the emulator says. None: nothing, and only the numbers are wrong. Empty: that depends on the schedule.
    report: str | None


class Mutant:
    """Kernels with faults in them, in one compilation: each behind a condition, of which one at most holds.

    Where a fault's text holds another's, it has to come before it.
    """

    def __init__(self, folder: Path, source: str, faults: dict[str, Fault]) -> None:
        self._names = list(faults)
        changes = [
            Change(f"cuda/attention/{fault.path}", fault.before, self._guarded(fault, number))
            for number, fault in enumerate(faults.values(), start=1)
        ]
        self.library = compile_mutant(folder, source, changes)

    @staticmethod
    def _guarded(fault: Fault, number: int) -> str:
        if fault.before.endswith(";"):
            return f"if (fault == {number}) {{ {fault.after} }} else {{ {fault.before} }}"
        return f"(fault == {number} ? ({fault.after}) : ({fault.before}))"

    def switch_on(self, name: str | None) -> None:
        """This fault alone, or none."""
        self.library.set_fault(0 if name is None else self._names.index(name) + 1)


def run_forward(library: ctypes.CDLL, seed: int, queries: int, keys: int, *, causal: bool = False) -> tuple[int, bool]:
    """The error of a mutant's launch, and whether the result is that of the formula."""
    query, key, value = inputs(torch.bfloat16, 1, 1, 1, queries, keys, 64)
    output, statistics = torch.full_like(query, float("nan")), torch.full((2, 1, queries), float("nan"))
    emulation_support.set_seed(seed)
    with (
        emulation_support.buffers(query=query, key=key, value=value, writable=False),
        emulation_support.buffers(output=output, statistics=statistics, written=False),
    ):
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (query, key, value, output, statistics)]
        error = library.attention(*pointers, *(ctypes.c_int64(size) for size in (1, 1, queries, keys)), int(causal))
    limits = Limits(right=0) if causal else NONE
    oracle, _ = forward("default", [tensor.double() for tensor in (query, key, value)], limits)
    return error, bool(testing.error_in_u(output, oracle) < 2.0)


def assert_found(fault: Fault, error: int, right: bool) -> None:
    """That a launch went as the fault says."""
    if fault.report is None:
        assert (error, right) == (0, False)
    elif fault.report:
        assert error == LAUNCH_FAILURE
        assert fault.report in emulation_support.report()
    else:
        assert error == LAUNCH_FAILURE or not right
