"""What disturbs a measurement is told beside it; caches, pinning and memory are what they are said to be."""

import os
from dataclasses import replace

import pytest
import torch

from fusewright_bench import accuracy, conditions, harness, memory, selection
from fusewright_bench.conditions import Snapshot
from fusewright_bench.plan import Plan

CPU = torch.device("cpu")
QUIET = Snapshot(wall_s=0.0, own_s=0.0, busy_s=0.0, stolen_s=0.0, clock_mhz=3000.0, throttled=0)
LATER = replace(QUIET, wall_s=10.0, own_s=9.9, busy_s=10.0)
STEADY = {"a": [1.0] * 12, "b": [2.0] * 12}


@pytest.mark.parametrize(
    ("after", "times", "told"),
    [
        (LATER, STEADY, None),
        (replace(LATER, busy_s=15.0), STEADY, "other work took 0.5 processors"),
        (replace(LATER, stolen_s=10.0 * (os.cpu_count() or 1)), STEADY, "hypervisor took 100%"),
        (replace(LATER, clock_mhz=2400.0), STEADY, "from 3000 to 2400 MHz"),
        (replace(LATER, throttled=2), STEADY, "throttled for heat 2 times"),
        (LATER, {name: [t * 1.03**i for i, t in enumerate(times)] for name, times in STEADY.items()}, "drifted by +2"),
        (replace(LATER, busy_s=None, stolen_s=None, clock_mhz=None, throttled=None), STEADY, None),
    ],
)
def test_a_disturbance_is_told(after: Snapshot, times: dict[str, list[float]], told: str | None) -> None:
    found = conditions.disturbances(QUIET, after, times)
    assert (len(found) == 1 and told in found[0]) if told else found == []


def test_one_slow_contender_is_no_drift_of_the_machine() -> None:
    times = {**{name: [1.0] * 12 for name in "abcdef"}, "g": [1.0] * 6 + [1.3] * 6}
    assert abs(conditions.drift(times)) < 0.05 and conditions.drift({}) == 0.0


def test_percentiles_wait_for_enough_samples() -> None:
    assert list(conditions.percentiles_us([1e-6] * 63)) == ["p50"]
    assert list(conditions.percentiles_us([1e-6] * 64)) == ["p50", "p90"]
    assert conditions.percentiles_us([n * 1e-6 for n in range(1, 664)])["p99"] == pytest.approx(656.4, abs=0.5)


def test_wide_rounds_are_told() -> None:
    assert conditions.spread_note([1.0] * 20) == []
    assert "50%" in conditions.spread_note([0.75, 0.75, 1.0, 1.25, 1.25])[0]


def test_a_snapshot_can_be_taken_anywhere() -> None:
    first, second = Snapshot.take(CPU), Snapshot.take(CPU)
    assert second.wall_s >= first.wall_s and second.own_s >= first.own_s


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity")
def test_pinning_holds_every_thread_and_ends() -> None:
    allowed = os.sched_getaffinity(0)
    with conditions.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == allowed


def test_cold_samples_are_single_calls_after_an_eviction() -> None:
    events: list[str] = []

    class Timer:
        def seconds(self, call: harness.Call, repeat: int) -> float:
            assert repeat == 1
            call()
            return 1e-6

    rounds = harness.run_rounds(
        {"a": lambda: events.append("call")}, Timer(), budget_s=0.0, evict=lambda: events.append("evict")
    )
    assert events == ["evict", "call"] * 6 and rounds.single == {"a"}


def test_a_contender_that_throws_leaves_the_rounds_of_the_others() -> None:
    calls = iter(range(100))

    def throws_later() -> None:
        if next(calls) > 4:
            raise RuntimeError("out of memory")

    timer = harness.WallTimer()
    rounds = harness.run_rounds({"a": throws_later, "b": lambda: sum(range(40000))}, timer, budget_s=0.0)
    assert len(rounds.times["b"]) == 6 and "a" not in rounds.times and str(rounds.failures["a"]) == "out of memory"


def test_resident_memory_sees_what_the_allocator_does_not() -> None:
    def touch() -> None:
        b"x" * (64 << 20)  # written to, or no page would become resident

    measured = memory.peak_resident_bytes(touch)
    if measured is None:
        pytest.skip("this system does not let a process reset its resident peak")
    assert 32 << 20 <= measured <= 128 << 20


def test_rounding_is_not_wrong_and_a_missing_mask_is() -> None:
    assert accuracy.wrong_results({"output": 3.0}, {"output": 1.0}, torch.bfloat16) == []
    assert accuracy.wrong_results({"output": 0.3 * 2**9}, {"output": 1.0}, torch.bfloat16) == ["output"]
    assert accuracy.wrong_results({"output": float("nan")}, {}, torch.float32) == ["output"]
    for share, wrong in ((2**-11, []), (0.01, ["output"])):  # TF32, and a scale that is off by a percent
        assert accuracy.wrong_results({"output": share * 2**24}, {"output": 1.0}, torch.float32) == wrong
    # Where plain PyTorch is as far off, the inputs are to blame.
    assert accuracy.wrong_results({"output": 0.3 * 2**9}, {"output": 60.0}, torch.bfloat16) == []


def test_a_plan_chooses_providers_by_backend_and_knows_its_studies() -> None:
    cases = selection.cases("scaling", ops=["causal_attention"], dtypes=["float32"], modes=["fwd"])
    plan = Plan(cases, CPU, (1,), 1.0, backends=frozenset({"cpu"}))
    wanted = {provider.label for provider in cases[0].operation.providers(CPU) if plan.wants(provider, cases[0])}
    assert wanted == {"fusewright:cpu", "torch"}
    assert [study.axis for study in plan.studies()] == ["sequence length", "head dimension", "batch"]
    everything = replace(plan, backends=None, every_provider=True)
    assert all(everything.wants(provider, cases[0]) for provider in cases[0].operation.providers(CPU))
    assert Plan(cases[:2], CPU, (1,), 1.0).studies() == []
