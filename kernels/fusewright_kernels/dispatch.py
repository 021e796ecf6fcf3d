"""Which backend serves a call, and why each other one does not.

An op describes a call by the few facts a kernel can refuse (device, dtypes, ranks), never by sizes, so that one
choice serves every shape and a traced graph does not specialise. Each backend of the op answers with a reason or
with None; the first that has no reason serves the call. The answers are kept, so a call pays one dictionary look-up.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fusewright_kernels.checks import ArgumentValueError, value_error

BACKENDS = ("cuda", "triton", "cpu", "reference")

FORCED_BACKEND = os.environ.get("FUSEWRIGHT_BACKEND") or None
if FORCED_BACKEND is not None and FORCED_BACKEND not in BACKENDS:
    raise value_error("FUSEWRIGHT_BACKEND", FORCED_BACKEND, f"one of {', '.join(BACKENDS)}")


class Call(NamedTuple):
    """The facts of a call that decide its backend. ``dtypes`` holds the first tensor's dtype first."""

    op: str
    device_type: str
    dtypes: tuple[torch.dtype, ...]
    ndim: int


class Refusal(NamedTuple):
    backend: str
    reason: str


class RefusedBackendError(ArgumentValueError):
    """A backend that was asked for by name cannot serve the call."""


class Decision(NamedTuple):
    """``by_design``: the reference is where the call belongs, so there is nothing to warn about."""

    call: Call
    backend: str
    refusals: tuple[Refusal, ...] = ()
    by_design: bool = False
    forced: bool = False


Predicate = Callable[[Call], str | None]

_predicates: dict[str, dict[str, Predicate]] = {}
_choices: dict[tuple[str, str, tuple[torch.dtype, ...], int, str | None], str] = {}
_fused: dict[Call, bool] = {}
_warned: set[str] = set()
_recording: list[Decision] | None = None


def device_type(tensor: torch.Tensor) -> str:
    """``tensor.device.type``, without the 0.3 microseconds it takes to make a device object of a CPU tensor's."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def register(op: str, predicates: dict[str, Predicate]) -> None:
    """Declare which backends op has; each predicate returns why it refuses a call, or None."""
    _predicates[op] = predicates


def predicates(op: str) -> dict[str, Predicate]:
    """What :func:`register` was given."""
    return _predicates[op]


def decide(call: Call, known: Refusal | None = None) -> Decision:
    """The backend for ``call`` and the refusal of every backend that ranks before it; ``known`` is one of those."""
    refusals: list[Refusal] = []
    for backend in BACKENDS[:-1]:
        reason = known.reason if known is not None and backend == known.backend else _refusal_of(call, backend)
        if reason is None and backend == "triton" and call.device_type == "cpu":
            reason = "interpreted Triton, thousands of times slower, serves CPU tensors only when forced"
        if reason is None:
            return Decision(call, backend, tuple(refusals))
        refusals.append(Refusal(backend, reason))
    by_design = torch.float64 in call.dtypes or call.device_type == "meta"
    return Decision(call, "reference", tuple(refusals), by_design)


def _refusal_of(call: Call, backend: str) -> str | None:
    predicate = _predicates[call.op].get(backend)
    return f"{call.op} has no {backend} kernel" if predicate is None else predicate(call)


# A traced graph must hold the choice as a constant: what decides it (a loaded library, a device) is not traceable.
@torch.compiler.assume_constant_result
def choose(op: str, device_type: str, dtypes: tuple[torch.dtype, ...], ndim: int, backend: str | None = None) -> str:
    """The backend that serves a call.

    Args:
        op: the op's name, as registered.
        device_type: ``"cpu"``, ``"cuda"`` or any other torch device type.
        dtypes: the dtypes of the call's tensors, the main input's first.
        ndim: the rank of the main input.
        backend: force this one; ``FUSEWRIGHT_BACKEND`` does the same for every call.

    Raises:
        ValueError: the forced backend is unknown or cannot serve the call.
    """
    # Every call comes through here, so an answer given before costs one look-up.
    chosen = _choices.get((op, device_type, dtypes, ndim, backend))
    if chosen is not None and _recording is None:
        return chosen
    call = Call(op, device_type, dtypes, ndim)
    forced = backend or FORCED_BACKEND
    decision = decide(call) if forced is None else _forced(call, forced)
    if _recording is not None:
        _recording.append(decision)
    if decision.backend == "reference" and not (decision.by_design or decision.forced):
        _warn_once(decision)
    _choices[op, device_type, dtypes, ndim, backend] = decision.backend
    return decision.backend


@torch.compiler.assume_constant_result
def serves(op: str, device_type: str, dtypes: tuple[torch.dtype, ...], ndim: int) -> bool:
    """Whether a call runs on a fused kernel (or on the one ``FUSEWRIGHT_BACKEND`` names), for a caller that has
    PyTorch's own kernel to turn to otherwise. Arguments as :func:`choose`.
    """
    call = Call(op, device_type, dtypes, ndim)
    served = _fused.get(call)
    if served is not None and _recording is None:
        return served
    decision = decide(call)
    if FORCED_BACKEND is None:
        served = decision.backend != "reference"
    else:
        served = FORCED_BACKEND == "reference" or _refusal_of(call, FORCED_BACKEND) is None
    if _recording is not None and not served:
        handed_on = Decision(call, "torch", decision.refusals)
        # A function and then the slot below it may both hand the same call on.
        if handed_on not in _recording[-1:]:
            _recording.append(handed_on)
    _fused[call] = served
    return served


@torch.compiler.assume_constant_result
def hand_on(
    op: str, device_type: str, dtypes: tuple[torch.dtype, ...], ndim: int, backend: str, reason: str, forced: bool
) -> str:
    """The backend that serves a call which ``backend``, chosen by the facts above, refuses by its sizes for ``reason``.

    Raises:
        RefusedBackendError: ``backend`` was forced.
    """
    call = Call(op, device_type, dtypes, ndim)
    if forced:
        raise _refused(call, backend, reason)
    decision = decide(call, Refusal(backend, reason))
    if _recording is not None:
        if _recording and _recording[-1][:2] == (call, backend):
            _recording.pop()
        _recording.append(decision)
    if decision.backend == "reference":
        _warn_once(decision)
    return decision.backend


def _forced(call: Call, backend: str) -> Decision:
    if backend not in BACKENDS:
        raise value_error("backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    reason = None if backend == "reference" else _refusal_of(call, backend)
    if reason is not None:
        raise _refused(call, backend, reason)
    return Decision(call, backend, forced=True)


def _refused(call: Call, backend: str, reason: str) -> RefusedBackendError:
    return RefusedBackendError(f"backend is {backend!r}, expected a backend that can serve {call.op}: {reason}")


def _warn_once(decision: Decision) -> None:
    causes = "; ".join(f"{refusal.backend}: {refusal.reason}" for refusal in decision.refusals)
    if causes not in _warned:
        _warned.add(causes)
        warnings.warn(f"{decision.call.op} runs as plain PyTorch. {causes}", stacklevel=4)


def forget() -> None:
    """Drop every kept choice; for tests, and after a library became available."""
    _choices.clear()
    _fused.clear()
    _warned.clear()


@contextmanager
def recording() -> Iterator[list[Decision]]:
    """Collect the decision of every call made inside the block."""
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer
