"""What disturbed a measurement: other work on the machine, clocks, drift, spread; and how to hold threads in place."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from fusewright_bench import environment

# Below these a difference is what any idle machine shows.
OTHER_WORK = 0.15  # processors
STOLEN = 0.02  # share of the processors' time that the hypervisor gave to others
CLOCK_CHANGE = 0.05
DRIFT = 0.10
SPREAD = 0.10

# A percentile is honest only with some values beyond it; after the rule of MLPerf's load generator.
_SAMPLES_FOR_PERCENTILE = {50: 1, 90: 64, 99: 662}


@dataclass(frozen=True)
class Snapshot:
    """The machine's counters at one moment; those that the system does not keep are None."""

    wall_s: float
    own_s: float
    busy_s: float | None
    stolen_s: float | None
    clock_mhz: float | None
    throttled: int | None

    @classmethod
    def take(cls, device: torch.device) -> "Snapshot":
        busy, stolen = _busy_and_stolen()
        clocks = environment.clocks_mhz(device)
        clock = median(clocks.values()) if clocks else None
        return cls(time.perf_counter(), time.process_time(), busy, stolen, clock, _throttle_events())


def _busy_and_stolen() -> tuple[float, float] | tuple[None, None]:
    """Seconds of all processors since the start, from Linux."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return None, None
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in first[1:9]]
    user, nice, system, _idle, _wait, interrupts, soft_interrupts, stolen = ticks
    return user + nice + system + interrupts + soft_interrupts, stolen


def _throttle_events() -> int | None:
    """How often a core was slowed down for heat, over all cores."""
    paths = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    counts = [int(path.read_text()) for path in paths]
    return sum(counts) if counts else None


def disturbances(before: Snapshot, after: Snapshot, times: Mapping[str, Sequence[float]]) -> list[str]:
    """What happened between two snapshots that may have moved ``times``, in words; nothing on a quiet machine."""
    found = []
    wall = max(after.wall_s - before.wall_s, 1e-9)
    if before.busy_s is not None and after.busy_s is not None:
        others = (after.busy_s - before.busy_s - (after.own_s - before.own_s)) / wall
        if others > OTHER_WORK:
            found.append(f"other work took {others:.1f} processors")
    if before.stolen_s is not None and after.stolen_s is not None:
        stolen = (after.stolen_s - before.stolen_s) / wall / (os.cpu_count() or 1)
        if stolen > STOLEN:
            found.append(f"the hypervisor took {stolen:.0%} of the time")
    if before.clock_mhz and after.clock_mhz and abs(after.clock_mhz / before.clock_mhz - 1.0) > CLOCK_CHANGE:
        found.append(f"the clock went from {before.clock_mhz:.0f} to {after.clock_mhz:.0f} MHz")
    if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
        found.append(f"throttled for heat {after.throttled - before.throttled} times")
    drifted = drift(times)
    if abs(drifted) > DRIFT:
        found.append(f"all times drifted by {drifted:+.0%} over the rounds")
    return found


def drift(times: Mapping[str, Sequence[float]]) -> float:
    """By how much the last third of the rounds was slower than the first, over all contenders alike."""
    usual = {name: median(values) for name, values in times.items()}
    rounds = min(map(len, times.values()), default=0)
    third = rounds // 3
    if third == 0:
        return 0.0
    level = [
        sum(math.log(values[index] / usual[name]) for name, values in times.items()) / len(times)
        for index in range(rounds)
    ]
    return math.exp(median(level[-third:]) - median(level[:third])) - 1.0


def spread_note(values: Sequence[float]) -> list[str]:
    """The middle half of the rounds as a share of the median, in words where it is wide."""
    quartiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    low, middle, high = quartiles.tolist()
    share = (high - low) / middle
    return [f"the middle half of its rounds spreads over {share:.0%}"] if share > SPREAD else []


def percentiles_us(seconds: Sequence[float]) -> dict[str, float]:
    """The percentiles of single calls that this many of them bear, in microseconds."""
    sample = torch.tensor(seconds, dtype=torch.float64)
    return {
        f"p{percent}": sample.quantile(percent / 100.0).item() * 1e6
        for percent, needed in _SAMPLES_FOR_PERCENTILE.items()
        if len(seconds) >= needed
    }


@contextmanager
def pinned(processors: int) -> Iterator[None]:
    """All threads of this process, and those it starts, on its first ``processors`` processors."""
    allowed = sorted(os.sched_getaffinity(0))
    _set_affinity(allowed[:processors])
    try:
        yield
    finally:
        _set_affinity(allowed)


def _set_affinity(processors: Sequence[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), processors)
        except ProcessLookupError:  # a thread that has ended since it was listed
            continue
