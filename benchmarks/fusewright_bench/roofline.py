"""What this machine can do, measured in the same run: the limits that a case's time is held against."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from fusewright_bench.case import Cost, dtype_name
from fusewright_bench.harness import Call, Timer, calibrate
from fusewright_kernels import native

_SAMPLES = 5
_FAR_BEYOND_CACHE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_EXPONENTIALS = {"cpu": 1 << 13, "cuda": 1 << 24}

# A working set of half a cache fits beside what else is in it.
_SHARE_OF_CACHE = 0.5

Limit = Literal["memory", "compute", "exp"]


@dataclass(frozen=True)
class Bandwidth:
    """Bytes read plus bytes written per nanosecond, over a working set of ``bytes`` that repeats."""

    bytes: int
    threads: int
    copy_gbps: float
    read_gbps: float
    probe: str


@dataclass(frozen=True)
class Peak:
    """Arithmetic of one unit: ``matrix`` by torch's matrix product of ``dtype``, the others by our own loops.

    ``gflops`` of ``exp`` are 10^9 exponentials a second.
    """

    unit: Literal["matrix", "vector", "tile", "exp"]
    dtype: str
    threads: int
    gflops: float
    probe: str


@dataclass
class Roofline:
    """Probes of one device, each measured once per run when first asked for."""

    device: torch.device
    timer: Timer
    bandwidths: dict[tuple[int, int], Bandwidth] = field(default_factory=dict)
    peaks: dict[tuple[str, str, int], Peak] = field(default_factory=dict)
    host: Any = None  # the compiled probe module, None where it cannot be used
    host_absence: str | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cpu":
            self.host, self.host_absence = _host_probes()

    def bandwidth(self, bytes: int, threads: int) -> Bandwidth:
        """Copy and read bandwidth of a working set of ``bytes``: a copy of half of it, a read of all of it."""
        key = (bytes, threads)
        if key not in self.bandwidths:
            self.bandwidths[key] = self._measure_bandwidth(bytes, threads)
        return self.bandwidths[key]

    def far_beyond_cache(self, threads: int) -> Bandwidth:
        """:meth:`bandwidth` of a working set that no cache holds."""
        return self.bandwidth(_FAR_BEYOND_CACHE_BYTES[self.device.type], threads)

    def matrix_peak(self, dtype: torch.dtype, threads: int) -> Peak:
        """What ``torch.mm`` reaches on square matrices."""
        key = ("matrix", dtype_name(dtype), threads)
        if key not in self.peaks:
            size = _MATRIX_SIZE[self.device.type]
            left = torch.ones((size, size), dtype=dtype, device=self.device)
            right = torch.ones_like(left)
            seconds = self._fastest(lambda: torch.mm(left, right))
            self.peaks[key] = Peak("matrix", key[1], threads, 2e-9 * size**3 / seconds, "torch.mm")
        return self.peaks[key]

    def vector_peak(self, threads: int) -> Peak | None:
        """float32 fused multiply-adds, and on the way the tile unit; None without the compiled probes."""
        key = ("vector", "float32", threads)
        if key not in self.peaks and self.host is not None:
            self.peaks[key] = Peak("vector", "float32", threads, self.host.fma_peak(threads), "fma_peak")
            tile_gflops = self.host.amx_peak(threads)
            if tile_gflops > 0:
                self.peaks["tile", "bfloat16", threads] = Peak("tile", "bfloat16", threads, tile_gflops, "amx_peak")
        return self.peaks.get(key)

    def exponential_peak(self, dtype: torch.dtype, threads: int) -> Peak:
        """Exponentials for results of ``dtype``: by our own vector code, of which that for two bytes is the cheaper."""
        key = ("exp", dtype_name(dtype), threads)
        if key not in self.peaks:
            if self.host is not None:
                rate = self.host.exp_peak(threads, dtype.itemsize == 2)
                self.peaks[key] = Peak("exp", key[1], threads, rate, "exp_peak")
            else:
                values = torch.linspace(-10.0, 0.0, _EXPONENTIALS[self.device.type], device=self.device, dtype=dtype)
                out = torch.empty_like(values)
                seconds = self._fastest(lambda: torch.exp(values, out=out))
                self.peaks[key] = Peak("exp", key[1], threads, values.numel() * 1e-9 / seconds, "torch.exp")
        return self.peaks[key]

    def cache_bytes(self) -> dict[str, int]:
        """Size of each cache level that is known, the nearest first."""
        if self.device.type == "cuda":
            return {"L2": torch.cuda.get_device_properties(self.device).L2_cache_size}
        sizes = self.host.cache_sizes() if self.host is not None else {}
        names = {"L1": "l1d", "L2": "l2", "L3": "l3"}
        return {level: sizes[name] for level, name in names.items() if sizes.get(name, 0) > 0}

    def memory_level(self, bytes: int) -> str:
        """The nearest level that holds ``bytes``; one processor's part of a cache that several share counts as one."""
        return next((level for level, size in self.cache_bytes().items() if bytes <= size), "memory")

    def memory_levels(self, threads: int) -> dict[str, Bandwidth]:
        """Bandwidth of every level, each over a working set that it holds and the one before does not."""
        found = {
            level: self.bandwidth(int(size * _SHARE_OF_CACHE), threads) for level, size in self.cache_bytes().items()
        }
        return {**found, "memory": self.far_beyond_cache(threads)}

    def floor_seconds(self, cost: Cost, dtype: torch.dtype, threads: int, copy_seconds: float) -> tuple[float, Limit]:
        """The least time a case can take here, and what sets it.

        ``copy_seconds`` is the time of a plain copy that moves the case's bytes, measured beside the case.
        """
        bounds: dict[Limit, float] = {"memory": copy_seconds}
        if cost.matrix:
            bounds["compute"] = cost.flops * 1e-9 / self.matrix_peak(dtype, threads).gflops
        if cost.exponentials:
            bounds["exp"] = cost.exponentials * 1e-9 / self.exponential_peak(dtype, threads).gflops
        limit = max(bounds, key=lambda name: bounds[name])
        return bounds[limit], limit

    def evicting_call(self) -> Call:
        """A call after which no cache holds anything of before: it writes as much as the largest holds, or more."""
        size = max(_FAR_BEYOND_CACHE_BYTES[self.device.type], *self.cache_bytes().values(), 0)
        filler = torch.empty(size // 4, dtype=torch.float32, device=self.device)
        return lambda: filler.fill_(0.0)

    def as_dict(self) -> dict[str, Any]:
        """The form in which a run keeps its limits; :func:`merged` joins two of them."""
        return {
            "probe": "torch" if self.host is None else "compiled",
            "compiled_probes_absent_because": self.host_absence,
            "cache_bytes": self.cache_bytes(),
            "bandwidth": [
                {**asdict(bandwidth), "level": self._probed_level(bandwidth)} for bandwidth in self.bandwidths.values()
            ],
            "peak": [asdict(peak) for peak in self.peaks.values()],
        }

    def _probed_level(self, bandwidth: Bandwidth) -> str:
        # A virtual machine reports the last-level cache of its host, of which it has a part: size alone does not tell.
        beyond = bandwidth.bytes >= _FAR_BEYOND_CACHE_BYTES[self.device.type]
        return "memory" if beyond else self.memory_level(bandwidth.bytes)

    def _measure_bandwidth(self, bytes: int, threads: int) -> Bandwidth:
        if self.host is not None:
            copy_gbps = self.host.copy_bandwidth(bytes, threads)
            return Bandwidth(bytes, threads, copy_gbps, self.host.read_bandwidth(bytes, threads), "compiled")
        copy = copy_of_bytes(bytes, self.device)
        values = torch.ones(max(bytes // 4, 1), device=self.device)
        # A sum reads and barely writes; torch's keeps up with memory, though not always with the nearest cache.
        copy_seconds, read_seconds = self._fastest(copy), self._fastest(values.sum)
        return Bandwidth(bytes, threads, bytes * 1e-9 / copy_seconds, bytes * 1e-9 / read_seconds, "torch")

    def _fastest(self, call: Call) -> float:
        repeat = calibrate(call, self.timer)
        return min(self.timer.seconds(call, repeat) for _ in range(_SAMPLES))


def merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The limits of an interrupted run, ``earlier``, and of the one that went on; the later measurement holds."""
    identities = {"bandwidth": ("bytes", "threads"), "peak": ("unit", "dtype", "threads")}
    joined = {}
    for name, identity in identities.items():
        entries = [*earlier.get(name, []), *later[name]]
        joined[name] = list({tuple(entry[key] for key in identity): entry for entry in entries}.values())
    return {**later, **joined}


def copy_of_bytes(bytes: int, device: torch.device) -> Call:
    """A call that reads ``bytes`` / 2 and writes as many: torch's copy between two contiguous tensors."""
    source = torch.ones(max(bytes // 8, 1), dtype=torch.float32, device=device)
    destination = torch.zeros_like(source)
    return lambda: destination.copy_(source)


def _host_probes() -> tuple[Any, str | None]:
    """The compiled probe module, or None and why it cannot be used."""
    try:
        return native.host(), None
    except native.BuildError as reason:
        return None, str(reason)
