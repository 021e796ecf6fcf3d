"""The rows of a run: what was measured, and every figure that follows from it."""

from collections.abc import Sequence
from statistics import median

from fusewright_bench import conditions, verdicts
from fusewright_bench.case import Case, Cost, dtype_name
from fusewright_bench.harness import Rounds
from fusewright_bench.plan import Plan
from fusewright_bench.results import COPY, Row
from fusewright_bench.roofline import Roofline


class RowMaker:
    """Makes the rows of one plan, with the limits of one device."""

    def __init__(self, plan: Plan, roofline: Roofline) -> None:
        self._plan = plan
        self._roofline = roofline

    def empty(self, case: Case, provider: str, backend: str, threads: int) -> Row:
        """A row that says what is measured and holds no figure yet."""
        switches = "".join(f" --{name}" for name in ("cold", "pin") if getattr(self._plan, name))
        reproduce = (
            f"fusewright bench --op {case.operation.name} --shape {case.shape.name} --dtype {dtype_name(case.dtype)}"
            f" --mode {case.mode} --threads {threads} --device {self._plan.device}{switches}"
        )
        return Row(
            op=case.operation.name,
            shape=case.shape.name,
            sizes=list(case.shape.sizes),
            dtype=dtype_name(case.dtype),
            mode=case.mode,
            threads=threads,
            provider=provider,
            backend=backend,
            reproduce=reproduce + _choice_of(provider, backend),
            flops=case.cost.flops,
            bytes=case.cost.bytes,
            cache=self._plan.cache,
        )

    def fill(self, row: Row, case: Case, rounds: Rounds, notes: Sequence[str]) -> None:
        """The figures that follow from the rounds; ``notes`` is what disturbed them."""
        own, copies = rounds.times[row.label], rounds.times[COPY]
        seconds = median(own)
        row.rounds = len(own)
        row.time_us = seconds * 1e6
        row.time_interval_us = [bound * 1e6 for bound in verdicts.bootstrap_interval(own)]
        row.percentiles_us = conditions.percentiles_us(own) if row.label in rounds.single else None
        row.notes = [*notes, *conditions.spread_note(own)]
        row.gbps = row.bytes * 1e-9 / seconds
        row.tflops = row.flops * 1e-12 / seconds
        if row.first_call_ms is not None and row.mode != "bwd":  # a backward's first call includes its forward
            row.compile_ms = max(row.first_call_ms - seconds * 1e3, 0.0)
        self._hold_against_the_roof(row, case, own, copies)
        self._hold_against_the_baseline(row, case, rounds)

    def _hold_against_the_roof(self, row: Row, case: Case, own: Sequence[float], copies: Sequence[float]) -> None:
        cost = Cost(0, row.bytes) if row.provider == COPY else case.cost
        row.memory_level = self._roofline.memory_level(row.bytes)
        floor, row.roofline_limit = self._roofline.floor_seconds(cost, case.dtype, row.threads, median(copies))
        # Against the copies of the same rounds, so that what slowed both cancels.
        by_copy = row.roofline_limit == "memory"
        share = median(verdicts.paired_ratios(copies, own)) if by_copy else floor / median(own)
        row.roofline_percent = 100.0 * share

    def _hold_against_the_baseline(self, row: Row, case: Case, rounds: Rounds) -> None:
        baseline = self._plan.baseline_of(case)
        if baseline in rounds.times and row.provider != COPY:
            row.baseline = baseline
            comparison = verdicts.compare(rounds.times[baseline], rounds.times[row.label])
            row.ratio, row.interval, row.verdict = comparison.ratio, list(comparison.interval), comparison.verdict


def _choice_of(provider: str, backend: str) -> str:
    """The options that choose one provider; ours exist once per backend."""
    if provider == COPY:
        return ""
    return f" --provider {provider}" + (f" --backend {backend}" if provider.startswith("fusewright") else "")
