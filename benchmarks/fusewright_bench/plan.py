"""What a run is to measure, and under which conditions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusewright_bench.case import Case, Provider
from fusewright_bench.results import Study


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        cases: the operations, each at a shape, dtype and mode.
        device: where.
        threads: CPU thread counts; every case is measured with each.
        budget_s: seconds to spend on all of it; slow cases take longer.
        providers: the names to run; None: those that run by default.
        backends: only these backends' providers; None: any.
        every_provider: also those that run only when asked for.
        baseline: what speed-ups are over, None for each operation's own. It runs whatever was chosen.
        cold: every sample is one call with nothing of it in the caches.
        pin: as many processors as threads.
        command: what a user would type to get this run.
    """

    cases: Sequence[Case]
    device: torch.device
    threads: tuple[int, ...]
    budget_s: float
    providers: frozenset[str] | None = None
    backends: frozenset[str] | None = None
    every_provider: bool = False
    baseline: str | None = None
    cold: bool = False
    pin: bool = False
    command: str = "fusewright bench"

    @property
    def groups(self) -> int:
        return len(self.cases) * len(self.threads)

    @property
    def cache(self) -> str:
        return "cold" if self.cold else "warm"

    def studies(self) -> list[Study]:
        """Every axis of growth along which at least three of the shapes of this plan lie."""
        shapes = {(case.operation.name, case.shape.name) for case in self.cases}
        found = []
        for operation in {case.operation.name: case.operation for case in self.cases}.values():
            for growth in operation.scaling:
                sizes = dict(zip((shape.name for shape in growth.shapes), growth.sizes, strict=True))
                measured = {name: size for name, size in sizes.items() if (operation.name, name) in shapes}
                if len(measured) >= 3:
                    found.append(Study(operation.name, growth.axis, measured))
        return found

    def baseline_of(self, case: Case) -> str:
        return self.baseline or case.operation.baseline

    def wants(self, provider: Provider, case: Case) -> bool:
        if case.mode not in provider.modes:
            return False
        if provider.name == self.baseline_of(case):
            return True
        if self.backends is not None and provider.backend not in self.backends:
            return False
        if self.providers is not None:
            return provider.name in self.providers
        return provider.by_default or self.every_provider or self.backends is not None
