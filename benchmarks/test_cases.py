"""The cases of the suite for those who use pytest-benchmark: ``pytest benchmarks --benchmark-json=results.json``.

A test per case and default provider that is present; ``-k`` chooses. Each is held against float64 before it is timed.
pytest-benchmark measures one provider after the other: for verdicts use ``fusewright bench``, which interleaves them.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (pip install 'fusewright[bench]')")

from pytest_benchmark.fixture import BenchmarkFixture

from fusewright_bench import accuracy, selection
from fusewright_bench.case import Case, Provider, bind_call
from fusewright_bench.harness import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [
        pytest.param(case, provider, id=f"{case.text} {provider.label}".replace(" ", "-"))
        for case in selection.cases(metafunc.config.getoption("--suite"))
        for provider in case.operation.providers(DEVICE)
        if provider.by_default and case.mode in provider.modes
    ]
    metafunc.parametrize(("case", "provider"), chosen)


def test_case(case: Case, provider: Provider, benchmark: BenchmarkFixture) -> None:
    reason = provider.absence(DEVICE, case.dtype)
    if reason is not None:
        pytest.skip(reason)
    inputs = case.inputs(DEVICE)
    results = accuracy.evaluate(case, provider.bind(inputs), inputs).results
    errors = accuracy.errors_in_u(results, accuracy.oracle_of(case, inputs))
    assert not accuracy.wrong_results(errors, {}, case.dtype), errors
    call = bind_call(case, provider, inputs)

    def timed() -> None:
        call()
        synchronize(DEVICE)

    benchmark.group = case.text
    benchmark.extra_info |= {
        "op": case.operation.name,
        "provider": provider.label,
        "flops": case.cost.flops,
        "bytes": case.cost.bytes,
        "errors_u": errors,
    }
    benchmark(timed)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"gbps": case.cost.bytes * 1e-9 / seconds, "tflops": case.cost.flops * 1e-12 / seconds}
