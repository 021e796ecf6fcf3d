"""The providers of one case, each bound and examined once: its accuracy, memory, first call and host overhead."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from fusewright_bench import accuracy
from fusewright_bench.case import Case, Inputs, Provider, bind_call
from fusewright_bench.harness import Call, HostTimer, run_rounds
from fusewright_bench.memory import peak_memory_bytes, peak_resident_bytes
from fusewright_bench.plan import Plan
from fusewright_bench.results import ORACLE, Absence, Results
from fusewright_bench.rows import RowMaker
from fusewright_bench.watch import Watch

_HOST_OVERHEAD_BUDGET_S = 0.1

Failures = Mapping[tuple[tuple[Any, ...], str], str]


@dataclass
class Contender:
    """A provider on a case: its bound call, None if it failed, and what does not depend on the thread count."""

    name: str
    backend: str
    label: str
    call: Call | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def failed(cls, name: str, backend: str, label: str, failure: str) -> "Contender":
        return cls(name, backend, label, facts={"failure": failure})


def first_line_of(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Preparation:
    """Prepares the providers of one case after another; ``failures`` of an earlier run are not tried again."""

    def __init__(self, plan: Plan, rows: RowMaker, watch: Watch, failures: Failures, results: Results) -> None:
        self._plan = plan
        self._rows = rows
        self._watch = watch
        self._failures = failures
        self._results = results
        self._host_overheads: dict[tuple[str, torch.dtype, str], dict[str, float | None]] = {}
        self._absences: dict[tuple[str, str, torch.dtype], str | None] = {}

    def contenders(self, case: Case) -> list[Contender]:
        """Every provider that is wanted and present; one that fails comes without a call and with the reason.

        Anything may go wrong inside a provider; it becomes a row that says so, and the run goes on.
        """
        known = self._known_failure(case, ORACLE)
        if known is not None:
            return [Contender.failed(ORACLE, "reference", ORACLE, known)]
        try:
            self._announce(case, ORACLE, "reference")
            inputs = case.inputs(self._plan.device)
            oracle = accuracy.oracle_of(case, inputs)
        except Exception as error:
            return [Contender.failed(ORACLE, "reference", ORACLE, first_line_of(error))]
        available = case.operation.providers(self._plan.device)
        plain_errors = self._plain_errors(case, available, inputs, oracle)
        made = []
        for provider in available:
            if not self._plan.wants(provider, case):
                continue
            self._announce(case, provider.name, provider.backend)
            if self._is_absent(provider, case):
                continue
            contender = Contender(provider.name, provider.backend, provider.label)
            contender.facts["failure"] = self._known_failure(case, provider.label)
            if contender.facts["failure"] is None:
                try:
                    self._examine(case, contender, provider, inputs, oracle, plain_errors)
                except Exception as error:
                    contender.call, contender.facts = None, {"failure": first_line_of(error)}
            made.append(contender)
        self._watch.rest()
        self._measure_host_overhead(case, available, [contender for contender in made if contender.call])
        return made

    def _known_failure(self, case: Case, label: str) -> str | None:
        return self._failures.get((self._rows.empty(case, label, "", 1).point, label))

    def _announce(self, case: Case, provider: str, backend: str) -> None:
        self._watch.step(self._rows.empty(case, provider, backend, max(self._plan.threads)))

    def _plain_errors(
        self, case: Case, available: Sequence[Provider], inputs: Inputs, oracle: accuracy.Results
    ) -> dict[str, float]:
        """What the operation's baseline is off by, per result; nothing where it fails, which its own row tells."""
        plain = next(provider for provider in available if provider.name == case.operation.baseline)
        if self._known_failure(case, plain.label) is not None:
            return {}
        self._announce(case, plain.name, plain.backend)
        try:
            return accuracy.errors_in_u(accuracy.evaluate(case, plain.bind(inputs), inputs).results, oracle)
        except Exception:
            return {}

    def _is_absent(self, provider: Provider, case: Case) -> bool:
        key = (provider.label, case.operation.name, case.dtype)
        if key not in self._absences:
            try:
                reason = provider.absence(self._plan.device, case.dtype)
            except Exception as error:
                reason = f"the question whether it runs here failed: {first_line_of(error)}"
            self._absences[key] = reason
            absence = None if reason is None else Absence(provider.label, reason, provider.install)
            if absence is not None and absence not in self._results.absent:
                self._results.absent.append(absence)
        return self._absences[key] is not None

    def _examine(
        self,
        case: Case,
        contender: Contender,
        provider: Provider,
        inputs: Inputs,
        oracle: accuracy.Results,
        plain_errors: dict[str, float],
    ) -> None:
        first = accuracy.evaluate(case, provider.bind(inputs), inputs)
        errors = accuracy.errors_in_u(first.results, oracle)
        contender.facts = {
            "first_call_ms": first.seconds * 1e3,
            "errors_u": errors,
            "error_u": max(errors.values()),
            "error_ratio": accuracy.error_ratio(errors, plain_errors) if plain_errors else None,
            "within_budget": accuracy.within_budget(errors, case.dtype),
        }
        wrong = accuracy.wrong_results(errors, plain_errors, case.dtype)
        if wrong:
            named = ", ".join(f"{name} is off by {errors[name]:.3g} u" for name in wrong)
            contender.facts["failure"] = f"wrong answer: {named}"
            return
        del first
        contender.call = bind_call(case, provider, inputs)
        contender.facts["peak_memory_bytes"] = peak_memory_bytes(contender.call, self._plan.device)
        if self._plan.device.type == "cpu":
            contender.facts["peak_resident_bytes"] = peak_resident_bytes(contender.call)

    def _measure_host_overhead(
        self, case: Case, available: Sequence[Provider], contenders: Sequence[Contender]
    ) -> None:
        """Microseconds of a call on the operation's tiny shape, the same for every shape of op, dtype and mode."""
        key = (case.operation.name, case.dtype, case.mode)
        known = self._host_overheads.setdefault(key, {})
        names = {contender.label: (contender.name, contender.backend) for contender in contenders}
        new = names.keys() - known.keys()
        if new:
            torch.set_num_threads(1)
            tiny = case.inputs(self._plan.device, tiny=True)
            calls: dict[str, Call] = {}
            for provider in available:
                if provider.label not in new:
                    continue
                with contextlib.suppress(Exception):  # a provider may refuse so small a shape: it has no such figure
                    calls[provider.label] = bind_call(case, provider, tiny)
            rounds = run_rounds(
                calls,
                HostTimer(self._plan.device),
                budget_s=_HOST_OVERHEAD_BUDGET_S,
                announce=lambda label: self._announce(case, *names[label]),
            )
            self._watch.rest()
            known |= dict.fromkeys(new)
            known |= {label: median(seconds) * 1e6 for label, seconds in rounds.times.items()}
        for contender in contenders:
            contender.facts["host_overhead_us"] = known[contender.label]
