"""Timing: interleaved rounds of all contenders, so that what disturbs the machine disturbs all of them alike."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
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


def run_rounds(calls: Mapping[str, Call], timer: Timer, *, budget_s: float, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per call of every contender, one value per round and an even number of rounds.

    Rounds go on until ``budget_s`` is spent, within MINIMUM_PAIRS and MAXIMUM_PAIRS. Warm caches: a contender whose
    sample is more than one call makes one untimed call first; a single call that lasts a millisecond or more has
    evicted its own beginning anyway.
    """
    deadline = time.perf_counter() + budget_s
    names = list(calls)
    repeats = {name: calibrate(call, timer) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    orders = abba_orders(len(names), seed)
    gc.collect()
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        for pair in range(MAXIMUM_PAIRS):
            if pair >= MINIMUM_PAIRS and time.perf_counter() >= deadline:
                break
            for order in (next(orders), next(orders)):
                for index in order:
                    name = names[index]
                    if repeats[name] > 1:
                        calls[name]()
                    seconds = timer.seconds(calls[name], repeats[name])
                    times[name].append(seconds)
                    if seconds * repeats[name] > LONG_SAMPLE_S:
                        repeats[name] = max(repeats[name] // 2, 1)
    finally:
        if gc_was_enabled:
            gc.enable()
    return times
