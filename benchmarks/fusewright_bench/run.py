"""One run of the suite: every case, every provider, every thread count."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

from fusewright_bench import accuracy, environment, verdicts
from fusewright_bench.case import Case, Cost, Inputs, Provider, bind_call, dtype_name
from fusewright_bench.harness import Call, HostTimer, run_rounds, timer_for
from fusewright_bench.memory import peak_memory_bytes
from fusewright_bench.results import Absence, Results, Row
from fusewright_bench.roofline import Roofline, copy_of_bytes

COPY = "copy"
_HOST_OVERHEAD_BUDGET_S = 0.1


@dataclass(frozen=True)
class Plan:
    """What to run. ``providers`` None means the default ones. The baseline, None for each operation's, always runs."""

    cases: Sequence[Case]
    device: torch.device
    threads: tuple[int, ...]
    budget_s: float
    providers: frozenset[str] | None = None
    baseline: str | None = None

    @property
    def groups(self) -> int:
        return len(self.cases) * len(self.threads)

    def baseline_of(self, case: Case) -> str:
        return self.baseline or case.operation.baseline

    def wants(self, provider: Provider, case: Case) -> bool:
        if case.mode not in provider.modes:
            return False
        chosen = provider.by_default if self.providers is None else provider.name in self.providers
        return chosen or provider.name == self.baseline_of(case)


class Observer(Protocol):
    """Who is told how far a run is."""

    def group_started(self, index: int, text: str, seconds_left: float) -> None: ...

    def group_finished(self, rows: Sequence[Row]) -> None: ...


@dataclass
class _Contender:
    """A provider on a case: its bound call and what does not depend on the thread count."""

    provider: Provider
    call: Call | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Runner:
    """Runs a :class:`Plan`; ``results`` holds what is done so far at any time."""

    def __init__(self, plan: Plan, observer: Observer) -> None:
        self._plan = plan
        self._observer = observer
        self._timer = timer_for(plan.device)
        self._roofline = Roofline(plan.device, self._timer)
        self._host_overheads: dict[tuple[str, torch.dtype, str], dict[str, float]] = {}
        self._absences: dict[tuple[str, str, torch.dtype], str | None] = {}
        self.results = Results(environment.capture(plan.device, plan.threads), environment.command_line())

    def run(self) -> Results:
        """Run every case. ``KeyboardInterrupt`` ends the run early and leaves ``results.complete`` false."""
        deadline = time.perf_counter() + self._plan.budget_s
        done = 0
        try:
            with _threads_restored():
                for case in self._plan.cases:
                    for rows in self._run_case(case, done, deadline):
                        self.results.cases += rows
                        self._observer.group_finished(rows)
                        done += 1
            self.results.complete = True
        except KeyboardInterrupt:
            self.results.complete = False
        self.results.roofline = self._roofline.as_dict()
        self.results.environment["clocks_mhz_at_end"] = environment.clocks_mhz(self._plan.device)
        return self.results

    def _run_case(self, case: Case, done: int, deadline: float) -> Iterator[list[Row]]:
        """The rows of one case, one group for each thread count."""
        seconds_left = max(deadline - time.perf_counter(), 0.0)
        self._observer.group_started(done, case.text, seconds_left)
        torch.set_num_threads(max(self._plan.threads))
        inputs = case.inputs(self._plan.device)
        contenders = self._contenders(case, inputs)
        copy = copy_of_bytes(case.cost.bytes, self._plan.device)
        for index, threads in enumerate(self._plan.threads):
            seconds_left = max(deadline - time.perf_counter(), 0.0)
            self._observer.group_started(done + index, f"{case.text}, threads {threads}", seconds_left)
            torch.set_num_threads(threads)
            budget_s = seconds_left / (self._plan.groups - done - index)
            yield self._time(case, contenders, copy, threads, budget_s)

    def _contenders(self, case: Case, inputs: Inputs) -> list[_Contender]:
        """Every provider that is present, bound, with its accuracy, memory and first-call time."""
        available = case.operation.providers(self._plan.device)
        wanted = [provider for provider in available if self._plan.wants(provider, case)]
        contenders = [_Contender(provider) for provider in wanted if not self._is_absent(provider, case)]
        oracle = accuracy.oracle_of(case, inputs)
        plain = next(provider for provider in available if provider.name == case.operation.baseline)
        plain_errors = accuracy.errors_in_u(accuracy.evaluate(case, plain.bind(inputs), inputs).results, oracle)
        for contender in contenders:
            # Anything may go wrong inside a provider; it becomes a row that says so, and the run goes on.
            try:
                self._examine(case, contender, inputs, oracle, plain_errors)
            except Exception as error:
                contender.call = None
                contender.facts = {"failure": _first_line_of(error)}
        self._measure_host_overhead(case, contenders)
        return contenders

    def _is_absent(self, provider: Provider, case: Case) -> bool:
        key = (provider.label, case.operation.name, case.dtype)
        if key not in self._absences:
            reason = provider.absence(self._plan.device, case.dtype)
            self._absences[key] = reason
            absence = None if reason is None else Absence(provider.label, reason, provider.install)
            if absence is not None and absence not in self.results.absent:
                self.results.absent.append(absence)
        return self._absences[key] is not None

    def _examine(
        self,
        case: Case,
        contender: _Contender,
        inputs: Inputs,
        oracle: accuracy.Results,
        plain_errors: dict[str, float],
    ) -> None:
        provider = contender.provider
        first = accuracy.evaluate(case, provider.bind(inputs), inputs)
        errors = accuracy.errors_in_u(first.results, oracle)
        not_a_number = [name for name, error in errors.items() if error == float("inf")]
        if not_a_number:
            contender.facts["failure"] = f"wrong answer: {', '.join(not_a_number)} not finite where the oracle is"
            return
        contender.facts = {
            "first_call_ms": first.seconds * 1e3,
            "errors_u": errors,
            "error_u": max(errors.values()),
            "error_ratio": accuracy.error_ratio(errors, plain_errors),
            "within_budget": accuracy.within_budget(errors, case.dtype),
        }
        del first
        contender.call = bind_call(case, provider, inputs)
        contender.facts["peak_memory_bytes"] = peak_memory_bytes(contender.call, self._plan.device)

    def _measure_host_overhead(self, case: Case, contenders: Sequence[_Contender]) -> None:
        """Microseconds of a call on the operation's tiny shape, the same for every shape of op, dtype and mode."""
        key = (case.operation.name, case.dtype, case.mode)
        known = self._host_overheads.setdefault(key, {})
        new = [contender for contender in contenders if contender.call and contender.provider.label not in known]
        if new:
            torch.set_num_threads(1)
            tiny = case.inputs(self._plan.device, tiny=True)
            calls: dict[str, Call] = {
                contender.provider.label: bind_call(case, contender.provider, tiny) for contender in new
            }
            times = run_rounds(calls, HostTimer(self._plan.device), budget_s=_HOST_OVERHEAD_BUDGET_S)
            known |= {label: median(seconds) * 1e6 for label, seconds in times.items()}
        for contender in contenders:
            if contender.call:
                contender.facts["host_overhead_us"] = known[contender.provider.label]

    def _time(
        self, case: Case, contenders: Sequence[_Contender], copy: Call, threads: int, budget_s: float
    ) -> list[Row]:
        """Time all contenders and the copy in the same rounds, and make a row of each."""
        calls = {contender.provider.label: contender.call for contender in contenders if contender.call}
        times = run_rounds({**calls, COPY: copy}, self._timer, budget_s=budget_s)
        self._probe(case, threads)
        rows = []
        for contender in contenders:
            row = self._row(case, contender.provider.name, contender.provider.backend, threads)
            for name, value in contender.facts.items():
                setattr(row, name, value)
            if contender.call:
                self._fill(row, case, times)
            rows.append(row)
        copy_row = self._row(case, COPY, "torch", threads)
        copy_row.flops = 0
        self._fill(copy_row, case, times)
        return [*rows, copy_row]

    def _probe(self, case: Case, threads: int) -> None:
        """Put the machine's limits for this case on record, beside the floor that the interleaved copy gives."""
        self._roofline.bandwidth(case.cost.bytes, threads)
        self._roofline.far_beyond_cache(threads)
        self._roofline.matrix_peak(case.dtype, threads)
        self._roofline.vector_peak(threads)

    def _row(self, case: Case, provider: str, backend: str, threads: int) -> Row:
        reproduce = (
            f"fusewright bench --op {case.operation.name} --shape {case.shape.name} --dtype {dtype_name(case.dtype)}"
            f" --mode {case.mode} --threads {threads} --device {self._plan.device}"
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
            reproduce=reproduce if provider == COPY else f"{reproduce} --provider {provider}",
            flops=case.cost.flops,
            bytes=case.cost.bytes,
        )

    def _fill(self, row: Row, case: Case, times: dict[str, list[float]]) -> None:
        """The figures that follow from the rounds."""
        own, copies = times[row.label], times[COPY]
        seconds = median(own)
        row.rounds = len(own)
        row.time_us = seconds * 1e6
        row.time_interval_us = [bound * 1e6 for bound in verdicts.bootstrap_interval(own)]
        row.gbps = row.bytes * 1e-9 / seconds
        row.tflops = row.flops * 1e-12 / seconds
        cost = Cost(row.flops, row.bytes, case.cost.matrix)
        floor, limit = self._roofline.floor_seconds(cost, case.dtype, row.threads, median(copies))
        # Against the copies of the same rounds, so that what slowed both cancels.
        share = median(verdicts.paired_ratios(copies, own)) if limit == "memory" else floor / seconds
        row.roofline_percent, row.roofline_limit = 100.0 * share, limit
        baseline = self._plan.baseline_of(case)
        if baseline in times and row.provider != COPY:
            row.baseline = baseline
            comparison = verdicts.compare(times[baseline], own)
            row.ratio, row.interval, row.verdict = comparison.ratio, list(comparison.interval), comparison.verdict


def _first_line_of(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
