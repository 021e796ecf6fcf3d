"""One run of the suite: every case, every provider, every thread count."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch

from fusewright_bench import conditions, environment
from fusewright_bench.case import Case
from fusewright_bench.contenders import Contender, Preparation, first_line_of
from fusewright_bench.harness import Call, Timer, run_rounds, timer_for
from fusewright_bench.plan import Plan
from fusewright_bench.results import COPY, Results, Row
from fusewright_bench.roofline import Roofline, copy_of_bytes, merged
from fusewright_bench.rows import RowMaker
from fusewright_bench.watch import Watch

_SAVE_EVERY_S = 5.0


class Observer(Protocol):
    """Who is told how far a run is."""

    def group_started(self, index: int, text: str, seconds_left: float) -> None: ...

    def group_finished(self, rows: Sequence[Row]) -> None: ...


class Runner:
    """Runs a :class:`Plan`; ``results`` holds what is done so far at any time.

    ``kept`` are the results of an earlier, unfinished run of the same plan: what it finished is not run again, and what
    failed is not tried again. ``save`` is called with the results every few seconds, between measurements.
    """

    def __init__(
        self,
        plan: Plan,
        observer: Observer,
        *,
        kept: Results | None = None,
        watch: Watch | None = None,
        save: Callable[[Results], None] = lambda results: None,
        timer: Timer | None = None,
    ) -> None:
        self._plan = plan
        self._observer = observer
        self._watch = watch or Watch()
        self._save = save
        self._timer = timer or timer_for(plan.device)
        self._roofline = Roofline(plan.device, self._timer)
        self._rows = RowMaker(plan, self._roofline)
        self.results = Results(environment.capture(plan.device, plan.threads), plan.command, studies=plan.studies())
        if kept:
            # Of an unfinished group there are only the rows of providers that ended the process.
            self.results.cases, self.results.absent = list(kept.cases), list(kept.absent)
        self._earlier_limits = kept.roofline if kept else {}
        self._finished = {row.case_key for row in self.results.cases if row.provider == COPY}
        failures = {(row.point, row.label): row.failure for row in self.results.cases if row.failure}
        self._preparation = Preparation(plan, self._rows, self._watch, failures, self.results)

    def run(self) -> Results:
        """Run every case. ``KeyboardInterrupt`` ends the run early and leaves ``results.complete`` false."""
        groups = [(case, self._threads_left(case)) for case in self._plan.cases]
        clock = _Clock(self._plan, sum(len(threads) for _, threads in groups))
        self._note_limits()
        self._save(self.results)
        try:
            with _threads_restored():
                for case, threads in groups:
                    for rows in self._run_case(case, threads, clock):
                        key = rows[0].case_key
                        self.results.cases = [row for row in self.results.cases if row.case_key != key] + rows
                        clock.group_finished()
                        self._observer.group_finished(rows)
                        if clock.time_to_save():
                            self._note_limits()
                            self._save(self.results)
            self.results.complete = True
        except KeyboardInterrupt:
            self.results.complete = False
        self._watch.rest()
        self._note_limits()
        self.results.environment["clocks_mhz_at_end"] = environment.clocks_mhz(self._plan.device)
        return self.results

    def _note_limits(self) -> None:
        self.results.roofline = merged(self._earlier_limits, self._roofline.as_dict())

    def _threads_left(self, case: Case) -> list[int]:
        keys = {threads: self._rows.empty(case, COPY, "", threads).case_key for threads in self._plan.threads}
        return [threads for threads, key in keys.items() if key not in self._finished]

    def _run_case(self, case: Case, thread_counts: Sequence[int], clock: "_Clock") -> Iterator[list[Row]]:
        """The rows of one case, one group for each thread count."""
        if not thread_counts:
            return
        self._observer.group_started(clock.done, case.text, clock.seconds_left())
        torch.set_num_threads(max(self._plan.threads))
        contenders = self._preparation.contenders(case)
        copy = copy_of_bytes(case.cost.bytes, self._plan.device)
        for threads in thread_counts:
            self._observer.group_started(clock.done, f"{case.text}, threads {threads}", clock.seconds_left())
            torch.set_num_threads(threads)
            with conditions.pinned(threads) if self._plan.pin else nullcontext():
                yield self._time(case, contenders, copy, threads, clock.group_budget_s())

    def _time(
        self, case: Case, contenders: Sequence[Contender], copy: Call, threads: int, budget_s: float
    ) -> list[Row]:
        """Time all contenders and the copy in the same rounds, and make a row of each."""
        rows = {
            contender.label: self._rows.empty(case, contender.name, contender.backend, threads)
            for contender in contenders
        }
        rows[COPY] = self._rows.empty(case, COPY, "torch", threads)
        rows[COPY].flops = 0
        calls = {contender.label: contender.call for contender in contenders if contender.call}
        before = conditions.Snapshot.take(self._plan.device)
        rounds = run_rounds(
            {**calls, COPY: copy},
            self._timer,
            budget_s=budget_s,
            announce=lambda label: self._watch.step(rows[label]),
            evict=self._roofline.evicting_call() if self._plan.cold else None,
        )
        self._watch.rest()
        notes = conditions.disturbances(before, conditions.Snapshot.take(self._plan.device), rounds.times)
        self._probe(case, threads)
        for contender in contenders:
            for name, value in contender.facts.items():
                setattr(rows[contender.label], name, value)
        for label, row in rows.items():
            if label in rounds.failures:
                row.failure = first_line_of(rounds.failures[label])
            elif label in rounds.times:
                self._rows.fill(row, case, rounds, notes)
        return list(rows.values())

    def _probe(self, case: Case, threads: int) -> None:
        """Put the machine's limits for this case on record, beside the floor that the interleaved copy gives."""
        self._roofline.memory_levels(threads)
        self._roofline.matrix_peak(case.dtype, threads)
        self._roofline.vector_peak(threads)
        self._roofline.exponential_peak(case.dtype, threads)


class _Clock:
    """How much of the budget is left, and for how many groups."""

    def __init__(self, plan: Plan, groups: int) -> None:
        self._start = self._saved = time.monotonic()
        self._groups = groups
        self._finished = 0
        self._kept = plan.groups - groups
        self._budget_s = plan.budget_s * groups / max(plan.groups, 1)

    @property
    def done(self) -> int:
        return self._kept + self._finished

    def group_finished(self) -> None:
        self._finished += 1

    def group_budget_s(self) -> float:
        return self._budget_left() / (self._groups - self._finished)

    def seconds_left(self) -> float:
        """As the groups so far went; at the start, the budget."""
        if not self._finished:
            return self._budget_s
        return (time.monotonic() - self._start) / self._finished * (self._groups - self._finished)

    def time_to_save(self) -> bool:
        due = time.monotonic() - self._saved > _SAVE_EVERY_S
        if due:
            self._saved = time.monotonic()
        return due

    def _budget_left(self) -> float:
        return max(self._start + self._budget_s - time.monotonic(), 0.0)


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
