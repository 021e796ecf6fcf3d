"""Timing: interleaved rounds of all contenders, so that what disturbs the machine disturbs all of them alike."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

MINIMUM_SAMPLE_S = 1e-3  # a thousand times the resolution that timers and interrupts leave
# A sample that grew past this, because the machine got busier since the calibration, halves the calls of the next.
LONG_SAMPLE_S = 1e-2
MINIMUM_PAIRS = 3
MAXIMUM_PAIRS = 50  # the interval of a median shrinks with the square root: more pairs buy little

Call = Callable[[], object]


class Timer(Protocol):
    def seconds(self, call: Call, repeat: int) -> float:
        """Seconds per call, over ``repeat`` calls in a row."""
        ...


class WallTimer:
    """The clock of the host, for work that is done when the call returns."""

    def seconds(self, call: Call, repeat: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(repeat):
            call()
        return (time.perf_counter_ns() - start) * 1e-9 / repeat


class CudaTimer:
    """Events on the device's stream: from an idle device to the end of the last kernel.

    Where a kernel is shorter than its launch, this is the time of the launch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def seconds(self, call: Call, repeat: int) -> float:
        torch.cuda.synchronize(self._device)
        self._start.record()
        for _ in range(repeat):
            call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / repeat


class HostTimer:
    """The clock of the host until the calls are issued, whether or not a device has done the work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, call: Call, repeat: int) -> float:
        per_call = WallTimer().seconds(call, repeat)
        synchronize(self._device)
        return per_call


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU already has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timer_for(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else WallTimer()


def calibrate(call: Call, timer: Timer) -> int:
    """How many calls make one sample last at least ``MINIMUM_SAMPLE_S``; also warms the call up."""
    repeat = 1
    while True:
        per_call = timer.seconds(call, repeat)
        if per_call * repeat >= MINIMUM_SAMPLE_S:
            return repeat
        # Never more than tenfold at once: the first calls are the slow ones.
        needed = int(1.2 * MINIMUM_SAMPLE_S / max(per_call, 1e-9)) + 1
        repeat = min(max(needed, repeat + 1), 10 * repeat)


def abba_orders(contenders: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Orders of the rounds: a random one, its reversal, another random one, its reversal, and so on."""
    shuffler = random.Random(seed)
    order = list(range(contenders))
    while True:
        shuffler.shuffle(order)
        yield tuple(order)
        yield tuple(reversed(order))


@dataclass
class Rounds:
    """What :func:`run_rounds` measured.

    Attributes:
        times: seconds per call of every contender, one value a round and an even number of them.
        single: the contenders of which every sample was a single call.
        failures: the contenders that threw, and what; they have no times.
    """

    times: dict[str, list[float]]
    single: set[str]
    failures: dict[str, Exception] = field(default_factory=dict)

    def drop(self, name: str, failure: Exception) -> None:
        self.failures[name] = failure
        del self.times[name]


def run_rounds(
    calls: Mapping[str, Call],
    timer: Timer,
    *,
    budget_s: float,
    seed: int = 0,
    announce: Callable[[str], None] = lambda name: None,
    evict: Call | None = None,
) -> Rounds:
    """Time all contenders in interleaved rounds until ``budget_s`` is spent, within MINIMUM_PAIRS and MAXIMUM_PAIRS.

    Warm caches: a contender whose sample is more than one call makes one untimed call first; a single call that lasts a
    millisecond or more has evicted its own beginning anyway. Cold caches: every sample is one call after ``evict``.
    ``announce`` hears the name before every sample. A contender that throws is out from then on.
    """
    deadline = time.perf_counter() + budget_s
    names = list(calls)
    rounds = Rounds({name: [] for name in names}, set(names))
    repeats: dict[str, int] = {}

    def sample(name: str) -> float:
        announce(name)
        if evict is not None:
            evict()
        elif repeats[name] > 1:
            calls[name]()
        return timer.seconds(calls[name], repeats[name])

    for name in names:
        announce(name)
        try:
            repeats[name] = calibrate(calls[name], timer) if evict is None else 1
        except Exception as failure:
            rounds.drop(name, failure)
    orders = abba_orders(len(names), seed)
    with _no_garbage_collection():
        for pair in range(MAXIMUM_PAIRS):
            if pair >= MINIMUM_PAIRS and time.perf_counter() >= deadline:
                break
            for name in (names[index] for order in (next(orders), next(orders)) for index in order):
                if name in rounds.failures:
                    continue
                try:
                    seconds = sample(name)
                except Exception as failure:
                    rounds.drop(name, failure)
                    continue
                rounds.times[name].append(seconds)
                if repeats[name] > 1:
                    rounds.single.discard(name)
                if seconds * repeats[name] > LONG_SAMPLE_S:
                    repeats[name] = max(repeats[name] // 2, 1)
    return rounds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
