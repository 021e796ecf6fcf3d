"""What a run produces."""

from dataclasses import dataclass, field
from typing import Any

# Fields may be added with a default; a file of before then still reads.
SCHEMA_VERSION = 1

COPY = "copy"
ORACLE = "oracle"
"""Providers that are none: the copy of the same bytes beside every case, and the float64 formula behind its errors."""


@dataclass
class Row:
    """One provider on one case with one thread count.

    ``ratio`` is the speed-up over ``baseline``, the median of the paired ratios, and ``interval`` its 95 percent
    bootstrap interval. ``roofline_percent`` is the least possible time over the time, where ``roofline_limit`` says
    what sets the least. Errors are in u of the dtype against a float64 oracle; ``error_ratio`` is the worst quotient
    to plain PyTorch's. ``compile_ms`` is what the first call took beyond a later one. ``percentiles_us`` are of single
    calls, and only those that the number of samples bears. ``notes`` say what disturbed the measurement. None means
    that it does not apply or, where ``failure`` is set, was not measured.
    """

    op: str
    shape: str
    sizes: list[int]
    dtype: str
    mode: str
    threads: int
    provider: str
    backend: str
    reproduce: str
    flops: int
    bytes: int
    time_us: float | None = None
    time_interval_us: list[float] | None = None
    rounds: int = 0
    baseline: str | None = None
    ratio: float | None = None
    interval: list[float] | None = None
    verdict: str | None = None
    tflops: float | None = None
    gbps: float | None = None
    roofline_percent: float | None = None
    roofline_limit: str | None = None
    peak_memory_bytes: int | None = None
    error_u: float | None = None
    errors_u: dict[str, float] | None = None
    error_ratio: float | None = None
    within_budget: bool | None = None
    host_overhead_us: float | None = None
    first_call_ms: float | None = None
    failure: str | None = None
    cache: str = "warm"
    memory_level: str | None = None
    compile_ms: float | None = None
    peak_resident_bytes: int | None = None
    percentiles_us: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def case_key(self) -> tuple[str, str, tuple[int, ...], str, str, int, str]:
        """What the rows of one group share."""
        return *self.point, self.threads, self.cache

    @property
    def point(self) -> tuple[str, str, tuple[int, ...], str, str]:
        """The case, whatever the thread count and the state of the caches."""
        return self.op, self.shape, tuple(self.sizes), self.dtype, self.mode

    @property
    def label(self) -> str:
        """``fusewright:cpu`` for our own, the provider's name for the others."""
        return f"{self.provider}:{self.backend}" if self.provider.startswith("fusewright") else self.provider


@dataclass(frozen=True)
class Absence:
    """A provider that could not run, why, and what would bring it."""

    provider: str
    reason: str
    install: str | None = None


@dataclass(frozen=True)
class Study:
    """Shapes of an op along one axis of growth: shape name to the size along the axis."""

    op: str
    axis: str
    sizes: dict[str, int]


@dataclass
class Results:
    environment: dict[str, Any]
    command: str
    cases: list[Row] = field(default_factory=list)
    absent: list[Absence] = field(default_factory=list)
    roofline: dict[str, Any] = field(default_factory=dict)
    studies: list["Study"] = field(default_factory=list)
    complete: bool = False
    schema_version: int = SCHEMA_VERSION
