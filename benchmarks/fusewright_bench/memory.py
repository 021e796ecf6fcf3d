"""Peak memory of one call, beyond what was allocated before it."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler's library reads this at its first use, and without it writes two lines to stderr for every profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_MEMORY_EVENT = "[memory]"
_RESET_PEAK = "5"  # what /proc/self/clear_refs takes to forget the peak of the resident size


def peak_memory_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held at once during one untimed call, outputs included and inputs not.

    Memory that a kernel takes from elsewhere (its stack, a thread's scratch, the C library) is not seen.
    """
    return _peak_on_cuda(call, device) if device.type == "cuda" else _peak_on_cpu(call)


def _peak_on_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(call: Callable[[], object]) -> int:
    """The peak of the running sum of the allocator's events, which the profiler records in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    recorder = profiler.profiler
    assert recorder is not None and recorder.kineto_results is not None
    events = [event for event in recorder.kineto_results.events() if event.name() == _MEMORY_EVENT]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident_bytes(call: Callable[[], object]) -> int | None:
    """How far one untimed call raises the resident size of this process: what torch's allocator does not see, too.

    Pages that earlier calls left resident for reuse do not count again, so this may be below the allocator's peak. None
    where the system does not tell.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):  # not Linux, not glibc, or a container that forbids it
        return None
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")
