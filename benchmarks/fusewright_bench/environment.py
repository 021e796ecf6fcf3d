"""The machine, the versions and the state that a result was measured in."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fusewright_kernels import native

_PACKAGES = ("torch", "triton", "numpy", "fusewright")
_VARIABLES = (
    "FUSEWRIGHT_BACKEND", "FUSEWRIGHT_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS", "OMP_PROC_BIND", "LD_PRELOAD",
)  # fmt: skip


def capture(device: torch.device, threads: tuple[int, ...]) -> dict[str, Any]:
    """Everything that can move a result; a value that cannot be read is None."""
    return {
        "device": device_name(device),
        "devices": _devices(),
        "cpu_model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": _kernel_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES},
        "commit": _commit(),
        "threads": list(threads),
        "clocks_mhz": clocks_mhz(device),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def clocks_mhz(device: torch.device) -> dict[str, float] | None:
    """Clocks at this moment, by core or for the device; None where the system does not tell."""
    if device.type == "cuda":
        return _cuda_clock(device)
    cores = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    by_policy = {path.parent.parent.name: float(path.read_text()) / 1e3 for path in sorted(cores)}
    return by_policy or _clocks_of_cpuinfo()


def _kernel_isa() -> str | None:
    """The instruction set of the CPU kernels that serve calls; None where they cannot be built."""
    return native.cpu_isa() if native.cpu_unavailable_reason() is None else None


def _cuda_clock(device: torch.device) -> dict[str, float] | None:
    try:
        return {"sm": float(torch.cuda.clock_rate(device))}
    except (ImportError, RuntimeError):  # needs NVML's Python package and a driver that answers
        return None


def _clocks_of_cpuinfo() -> dict[str, float] | None:
    clocks = [line.split(":")[1] for line in _cpuinfo() if line.startswith("cpu MHz")]
    return {f"cpu{index}": float(clock) for index, clock in enumerate(clocks)} or None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _cpu_model() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
            }
        )
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package runs from, ``+`` where it has changes; None outside a checkout."""
    folder = Path(__file__).parent
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return None
    # A package installed into an environment inside some other project's checkout is not of that project's commit.
    if not _git(folder, "ls-files", Path(__file__).name):
        return None
    return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
