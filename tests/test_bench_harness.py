"""The benchmark suite: its statistics, the order of its rounds, its files, and one small run from end to end."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fusewright_bench import (
    accuracy,
    cli,
    compare,
    exit_codes,
    harness,
    memory,
    plan,
    roofline,
    run,
    selection,
    verdicts,
)
from fusewright_bench.case import Case, Cost, Forward, Inputs, Outputs, Provider, bind_call
from fusewright_bench.cases import OPERATIONS
from fusewright_bench.report import json_file, markdown, table, terminal
from fusewright_bench.results import Results, Row
from fusewright_bench.verdicts import FASTER, SAME, SLOWER, UNCLEAR, Interval

CPU = torch.device("cpu")


class Silent:
    def group_started(self, index: int, text: str, seconds_left: float) -> None:
        pass

    def group_finished(self, rows: Sequence[Row]) -> None:
        pass


def noisy(level: float, rounds: int, spread: float, seed: int) -> list[float]:
    """Times around ``level`` with a log-normal spread."""
    generator = torch.Generator().manual_seed(seed)
    return (level * (spread * torch.randn(rounds, generator=generator)).exp()).tolist()


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1.04, 1.20), FASTER),
        ((0.80, 0.96), SLOWER),
        ((0.98, 1.02), SAME),
        ((0.99, 1.10), UNCLEAR),
        ((0.9, 1.2), UNCLEAR),
    ],
)
def test_verdict(interval: tuple[float, float], expected: str) -> None:
    assert verdicts.verdict(Interval(*interval)) == expected


def test_the_bootstrap_interval_holds_the_median_about_as_often_as_it_says() -> None:
    intervals = [verdicts.bootstrap_interval(noisy(1.0, 20, 0.1, seed)) for seed in range(100)]
    assert sum(interval.low <= 1.0 <= interval.high for interval in intervals) >= 88
    assert verdicts.bootstrap_interval([1.0, 2.0, 3.0]) == verdicts.bootstrap_interval([1.0, 2.0, 3.0])


def test_the_same_code_is_never_slower_and_a_tenth_is_found() -> None:
    for seed in range(20):
        baseline, other = noisy(1.0, 40, 0.03, 2 * seed), noisy(1.0, 40, 0.03, 2 * seed + 1)
        assert verdicts.compare(baseline, other).verdict in (SAME, UNCLEAR)
        assert verdicts.compare(baseline, [1.1 * seconds for seconds in other]).verdict == SLOWER


def test_a_drift_of_the_machine_cancels_within_a_pair() -> None:
    # Positions 0..3 of an ABBA pair on a machine that slows down by a factor per position.
    drift = [1.5**position for position in range(4)]
    assert verdicts.paired_ratios([drift[0], drift[3]], [drift[1], drift[2]]) == pytest.approx([1.0])


def test_rounds_come_in_mirrored_pairs_of_shuffled_orders() -> None:
    orders = list(itertools.islice(harness.abba_orders(4, seed=0), 40))
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert all(second == first[::-1] for first, second in zip(orders[0::2], orders[1::2], strict=True))
    assert len(set(orders[0::2])) > 5
    assert orders == list(itertools.islice(harness.abba_orders(4, seed=0), 40))


class FakeTimer:
    """Time that passes only inside calls, each of which adds its cost to ``now``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def seconds(self, call: harness.Call, repeat: int) -> float:
        before = self.now
        for _ in range(repeat):
            call()
        return (self.now - before) / repeat

    def contender(self, name: str, cost: float) -> harness.Call:
        def call() -> None:
            self.now += cost
            self.order.append(name)

        return call


def test_calibration_makes_samples_long_enough() -> None:
    timer = FakeTimer()
    assert harness.calibrate(timer.contender("slow", 0.5), timer) == 1
    repeat = harness.calibrate(timer.contender("fast", 1e-6), timer)
    assert harness.MINIMUM_SAMPLE_S <= repeat * 1e-6 < 2 * harness.MINIMUM_SAMPLE_S


def test_every_contender_is_timed_once_per_round() -> None:
    timer = FakeTimer()
    calls = {name: timer.contender(name, cost) for name, cost in (("a", 0.5), ("b", 0.25), ("c", 0.125))}
    rounds_done = harness.run_rounds(calls, timer, budget_s=0.0)
    assert rounds_done.times == {"a": [0.5] * 6, "b": [0.25] * 6, "c": [0.125] * 6}
    assert rounds_done.single == {"a", "b", "c"} and not rounds_done.failures
    rounds = [timer.order[start : start + 3] for start in range(3, len(timer.order), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert all(second == first[::-1] for first, second in zip(rounds[0::2], rounds[1::2], strict=True))


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.ones(1 << 16)  # 256 KiB
    assert memory.peak_memory_bytes(lambda: x.add(x), CPU) == x.nbytes
    assert memory.peak_memory_bytes(lambda: x.add(x).add(x), CPU) == 2 * x.nbytes
    assert memory.peak_memory_bytes(lambda: x.add_(x), CPU) == 0


@pytest.mark.parametrize(
    ("op", "mode"), [(name, mode) for name, operation in OPERATIONS.items() for mode in operation.modes]
)
def test_every_declaration_is_accurate_and_can_be_timed(op: str, mode: str) -> None:
    operation = OPERATIONS[op]
    for dtype in (torch.float32, torch.bfloat16):
        shape = operation.shape(
            {2: "4x300", 3: "5x40x16", 4: "5x3x16x24", 5: "1x2x128x16x2", 6: "1x2x2x40x40x16"}[operation.rank]
        )
        assert shape is not None
        case = Case(operation, shape, dtype, mode)
        assert case.cost.flops > 0 and case.cost.bytes > 0
        inputs = case.inputs(CPU)
        oracle = accuracy.oracle_of(case, inputs)
        for provider in operation.providers(CPU):
            runs_here = provider.by_default and mode in provider.modes and provider.absence(CPU, dtype) is None
            if not runs_here:
                continue
            results = accuracy.evaluate(case, provider.bind(inputs), inputs).results
            errors = accuracy.errors_in_u(results, oracle)
            assert errors.keys() == oracle.keys()
            # Only ours are held to the budget: torch sums a low-precision weight gradient in that precision, attention
            # written out rounds its logits to it, and peers of LSH attention mask a row alone by a constant.
            ours = provider.name.startswith("fusewright")
            assert not ours or accuracy.within_budget(errors, dtype), (provider.label, errors)
            timed = bind_call(case, provider, inputs)()
            assert len(timed) == len(operation.outputs if mode == "fwd" else operation.differentiable)


@pytest.mark.parametrize("op", ["attention", "causal_attention", "masked_attention", "decode_attention"])
def test_each_backend_of_torchs_attention_by_itself_is_accurate_or_absent(op: str) -> None:
    operation = OPERATIONS[op]
    shape = operation.shape("1x4x2x40x40x16")
    assert shape is not None
    case = Case(operation, shape, torch.float32, "both")
    inputs = case.inputs(CPU)
    oracle = accuracy.oracle_of(case, inputs)
    found = {}
    for provider in operation.providers(CPU):
        if provider.name in ("torch-math", "torch-flash", "torch-efficient", "torch-cudnn"):
            found[provider.name] = provider.absence(CPU, torch.float32)
            if found[provider.name] is None:
                results = accuracy.evaluate(case, provider.bind(inputs), inputs).results
                assert max(accuracy.errors_in_u(results, oracle).values()) < 24.0
    assert len(found) == 4 and found["torch-math"] is None and "no such kernel" in (found["torch-cudnn"] or "")


@pytest.mark.parametrize(
    ("op", "mode", "tensors"), [("layer_norm", "fwd", 2), ("layer_norm", "both", 5), ("softmax", "bwd", 3)]
)
def test_bytes_are_those_of_the_operands(op: str, mode: str, tensors: int) -> None:
    operation = OPERATIONS[op]
    shape = operation.shape("1000x1000")
    assert shape is not None
    cost = operation.cost(shape, torch.bfloat16, mode)
    assert cost.bytes == pytest.approx(tensors * 2e6, rel=0.01)


def test_queries_of_a_packed_projection_are_a_strided_view() -> None:
    operation = OPERATIONS["layer_norm"]
    shape = operation.shape("vit-b16-qk-norm")
    assert shape is not None
    tensor = Case(operation, shape, torch.float32, "fwd").inputs(CPU)["input"]
    assert tensor.shape == shape.sizes and not tensor.is_contiguous() and tensor.stride(-1) == 1


class FakeHost:
    """The compiled probes of a machine with known limits and no tile unit."""

    def copy_bandwidth(self, bytes: int, threads: int) -> float:
        return 10.0 * threads

    def read_bandwidth(self, bytes: int, threads: int) -> float:
        return 15.0 * threads

    def fma_peak(self, threads: int) -> float:
        return 100.0 * threads

    def amx_peak(self, threads: int) -> float:
        return 0.0

    def exp_peak(self, threads: int, two_bytes: bool) -> float:
        return 4.0 if two_bytes else 2.0

    def cache_sizes(self) -> dict[str, int]:
        return {"l1d": 32 << 10, "l2": 1 << 20, "l3": 0, "line": 64}


def test_the_roofline_prefers_the_compiled_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_host_probes", lambda: (FakeHost(), None))
    limits = roofline.Roofline(CPU, harness.WallTimer())
    bandwidth, vector = limits.bandwidth(3000 << 10, threads=2), limits.vector_peak(2)
    assert (bandwidth.bytes, bandwidth.copy_gbps, bandwidth.read_gbps) == (3000 << 10, 20.0, 30.0)
    assert vector is not None and vector.gflops == 200.0
    assert {peak["unit"] for peak in limits.as_dict()["peak"]} == {"vector"}
    row_wise, product = Cost(flops=10**12, bytes=8), Cost(flops=10**12, bytes=8, matrix=True)
    assert limits.floor_seconds(row_wise, torch.float32, 1, copy_seconds=1e-6) == (1e-6, "memory")
    seconds, limit = limits.floor_seconds(product, torch.float32, 1, copy_seconds=1e-6)
    assert limit == "compute" and seconds == pytest.approx(1e3 / limits.matrix_peak(torch.float32, 1).gflops)
    many = Cost(flops=0, bytes=8, exponentials=10**9)
    assert limits.floor_seconds(many, torch.float32, 1, copy_seconds=1e-6) == (0.5, "exp")
    assert limits.floor_seconds(many, torch.bfloat16, 1, copy_seconds=1e-6) == (0.25, "exp")


def test_the_limits_of_an_interrupted_run_are_kept() -> None:
    earlier = {
        "bandwidth": [{"bytes": 1, "threads": 1, "copy_gbps": 5.0}, {"bytes": 1, "threads": 2, "copy_gbps": 6.0}],
        "peak": [{"unit": "matrix", "dtype": "float32", "threads": 1, "gflops": 7.0}],
    }
    later = {"probe": "torch", "bandwidth": [{"bytes": 1, "threads": 2, "copy_gbps": 8.0}], "peak": []}
    joined = roofline.merged(earlier, later)
    assert [entry["copy_gbps"] for entry in joined["bandwidth"]] == [5.0, 8.0]
    assert joined["peak"] == earlier["peak"] and joined["probe"] == "torch"
    assert roofline.merged({}, later) == later


def test_bandwidth_is_measured_in_every_cache_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_host_probes", lambda: (FakeHost(), None))
    limits = roofline.Roofline(CPU, harness.WallTimer())
    assert {level: found.bytes for level, found in limits.memory_levels(1).items()} == {
        "L1": 16 << 10, "L2": 512 << 10, "memory": 1 << 20,
    }  # fmt: skip
    assert [limits.memory_level(size) for size in (1, 32 << 10, 33 << 10, 2 << 20)] == ["L1", "L1", "L2", "memory"]


def small_plan(**changes: object) -> plan.Plan:
    settings = {
        "cases": selection.cases(ops=["layer_norm"], shapes=["16x64"], dtypes=["float32"], modes=["fwd"]),
        "device": CPU,
        "threads": (1,),
        "budget_s": 0.2,
        "providers": frozenset({"naive"}),
    }
    return plan.Plan(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def small_probes() -> Iterator[None]:
    """torch's probes at small sizes: the real ones take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "_host_probes", lambda: (None, "left out of this test"))
        patch.setattr(roofline, "_FAR_BEYOND_CACHE_BYTES", {"cpu": 1 << 20})
        patch.setattr(roofline, "_MATRIX_SIZE", {"cpu": 64})
        yield


class ConstructedTimer:
    """A clock on which every call takes a millisecond, and one of a :func:`slowed` provider as much more as it says."""

    def __init__(self) -> None:
        self.extra = 0.0

    def seconds(self, call: harness.Call, repeat: int) -> float:
        self.extra = 0.0
        for _ in range(repeat):
            call()
        return 1e-3 + self.extra / repeat


def with_providers(case: Case, providers: Sequence[Provider]) -> Case:
    return replace(case, operation=replace(case.operation, providers=lambda device: tuple(providers)))


def slowed(case: Case, name: str, timer: ConstructedTimer, extra: float) -> Case:
    """``case`` with the provider ``name`` slower by ``extra`` milliseconds on the clock of ``timer``."""

    def bind(provider: Provider, inputs: Inputs) -> Forward:
        forward = provider.bind(inputs)

        def slow() -> Outputs:
            timer.extra += 1e-3 * extra
            return forward()

        return slow

    return with_providers(
        case,
        [
            replace(provider, bind=partial(bind, provider)) if provider.name == name else provider
            for provider in case.operation.providers(CPU)
        ],
    )


@pytest.fixture(scope="module")
def small_results() -> Results:
    timer = ConstructedTimer()
    case = slowed(small_plan().cases[0], "naive", timer, 1.0)
    return run.Runner(small_plan(cases=[case]), Silent(), timer=timer).run()


def test_a_run_measures_speed_and_accuracy_of_two_providers(small_results: Results) -> None:
    assert small_results.complete
    rows = {row.label: row for row in small_results.cases}
    assert rows.keys() == {"naive", "torch", "copy"}
    naive = rows["naive"]
    assert naive.failure is None and naive.baseline == "torch" and naive.verdict == SLOWER
    assert naive.ratio == pytest.approx(0.5) and naive.interval == pytest.approx([0.5, 0.5])
    assert naive.rounds >= 6 and naive.time_us == pytest.approx(2000.0)
    assert naive.host_overhead_us and naive.first_call_ms
    assert naive.percentiles_us is not None and naive.percentiles_us["p50"] == pytest.approx(2000.0)
    assert naive.within_budget and naive.error_u and naive.error_u < 4.0
    assert naive.peak_memory_bytes is not None and naive.peak_memory_bytes >= 16 * 64 * 4
    assert naive.gbps == pytest.approx(naive.bytes * 1e-3 / naive.time_us)
    assert rows["torch"].ratio == pytest.approx(1.0)
    assert rows["copy"].roofline_percent == pytest.approx(100.0) and rows["copy"].ratio is None
    assert "--op layer_norm --shape 16x64 --dtype float32 --mode fwd --threads 1" in naive.reproduce
    assert small_results.roofline["bandwidth"] and small_results.environment["cores"]


def test_a_json_file_reads_back_as_it_was(small_results: Results, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    json_file.write(small_results, path)
    assert json_file.read(path) == small_results
    document = json.loads(path.read_text())
    assert document["schema_version"] == 1
    named_in_the_design = (
        "op shape dtype mode backend provider time_us interval ratio verdict tflops gbps roofline_percent"
        " peak_memory_bytes error_u error_ratio host_overhead_us first_call_ms reproduce threads"
    )
    assert set(named_in_the_design.split()) <= document["cases"][0].keys()
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_what_is_not_a_number_becomes_null(small_results: Results, tmp_path: Path) -> None:
    row = Row(**{**vars(small_results.cases[0]), "error_u": math.nan, "errors_u": {"output": math.inf}})
    json_file.write(Results({}, "", [row]), tmp_path / "a.json")
    read = json_file.read(tmp_path / "a.json").cases[0]
    assert read.error_u is None and read.errors_u == {"output": None}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 0}', '{"schema_version": 1}'])
def test_a_file_that_is_no_result_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(json_file.ResultFileError, match=r"bad\.json"):
        json_file.read(path)
    assert cli.main(["compare", str(path), str(path)]) == exit_codes.USAGE
    assert "bad.json" in capsys.readouterr().err


def test_reports_name_every_provider(small_results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(small_results)
    for text in (capsys.readouterr().out, markdown.render(small_results)):
        assert "layer_norm" in text and "16x64" in text and "naive" in text and "SLOWER" in text
    lines = table.cells(small_results.cases, wide=True)
    assert len(set(map(len, [table.titles(True), *lines]))) == 1
    plain = table.plain_table(table.titles(False), table.cells(small_results.cases, wide=False))
    assert "naive" in plain and "host us" not in plain
    assert table.time_text(0.01234) == "0.0123 us" and table.time_text(123456.0) == "123 ms"
    assert table.bytes_text(3 << 20) == "3.00 MiB" and table.significant(12345.6) == "12346"


def test_a_provider_that_throws_or_is_wrong_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_plan().cases[0]

    def throw(inputs: object) -> object:
        raise RuntimeError("no such kernel\nsecond line")

    broken = Provider("broken", "none", throw)  # type: ignore[arg-type]
    wrong = Provider("wrong", "none", lambda inputs: lambda: (inputs["input"] * math.nan,))
    providers = (*case.operation.providers(CPU), broken, wrong)
    broken_plan = small_plan(
        cases=[with_providers(case, providers)],
        providers=frozenset({"broken", "wrong"}),
        budget_s=0.1,
    )
    results = run.Runner(broken_plan, Silent()).run()
    rows = {row.label: row for row in results.cases}
    assert rows["broken"].failure == "RuntimeError: no such kernel" and rows["broken"].time_us is None
    assert rows["wrong"].failure is not None and "output" in rows["wrong"].failure
    assert rows["torch"].time_us and "no such kernel" in markdown.render(results)


def test_an_interrupt_keeps_what_is_done() -> None:
    class Impatient(Silent):
        def group_finished(self, rows: Sequence[Row]) -> None:
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    results = run.Runner(small_plan(budget_s=0.1), Impatient()).run()
    assert not results.complete and {row.label for row in results.cases} == {"naive", "torch", "copy"}
    assert torch.get_num_threads() == before


def changed(results: Results, speed: float) -> Results:
    """``results`` with every provider but the baseline ``speed`` times as fast."""
    rows = [Row(**vars(row)) for row in results.cases]
    for row in rows:
        if row.ratio is not None and row.provider != row.baseline and row.time_us:
            row.ratio *= speed
            row.interval = [row.ratio * 0.99, row.ratio * 1.01]
            row.time_us /= speed
    return Results(results.environment, results.command, rows, complete=True)


@pytest.mark.parametrize(("speed", "code"), [(1.0, 0), (0.8, 1), (1.25, 0)])
def test_compare_exits_with_one_if_something_became_slower(
    speed: float, code: int, small_results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, report = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.md"
    json_file.write(changed(small_results, 1.0), before)
    json_file.write(changed(small_results, speed), after)
    assert cli.main(["compare", str(before), str(after), "--fail-on", "slow", "--markdown", str(report)]) == code
    assert cli.main(["compare", str(before), str(after)]) == 0
    assert "naive" in capsys.readouterr().out and "naive" in report.read_text()
    (change,) = [change for change in compare.changes(small_results, changed(small_results, speed)) if change.ratio]
    assert change.ratio == pytest.approx(speed)


def test_compare_marks_another_machine(small_results: Results) -> None:
    other = Results({**small_results.environment, "device": "abacus"}, "", small_results.cases)
    assert compare.mismatches(small_results, small_results) == []
    (difference,) = compare.mismatches(small_results, other)
    assert "abacus" in difference.text and difference.other_machine


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--op", "layr_norm"], "layer_norm"),
        (["--shape", "gpt3"], "gpt2"),
        (["--provider", "tortch"], "torch"),
        (["--backend", "cpuu"], "cpu"),
        (["--dtype", "float8"], "float16"),
        (["--mode", "sideways"], "both"),
        (["--suite", "quik"], "quick"),
        (["--threads", "0"], "--threads"),
        (["--budget", "-1"], "--budget"),
        (["--device", "toaster"], "device"),
    ],
)
def test_wrong_usage_exits_with_two_and_the_nearest_name(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments, "--list"])
    assert stop.value.code == exit_codes.USAGE
    assert hint in capsys.readouterr().err


def test_bench_lists_cases_and_providers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = ["--op", "causal_attention", "--suite", "full", "--dtype", "fp32", "--mode", "fwd"]
    assert cli.main(["bench", *chosen, "--list"]) == 0
    listed = capsys.readouterr().out
    assert "llama3-8b (1x32x8x1024x1024x128)" in listed and not any(tmp_path.iterdir())
    for provider in ("fusewright:cpu", "naive", "torch-flash", "torch-cudnn", "flex-attention", "torch-compile"):
        assert provider in listed
    assert "xformers is not installed (pip install xformers)" in listed or find_spec("xformers")
