"""The tests that every backend passes, run on the CUDA kernels in the emulator."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import emulation_support
import pytest
import test_cross_entropy
import test_feed_forward
import test_normalization_dropout
import test_normalization_invariance
import test_normalization_layouts
import test_softmax
from op_support import Target

pytestmark = emulation_support.needs_emulator

MODULES = (
    test_cross_entropy,
    test_feed_forward,
    test_normalization_dropout,
    test_normalization_invariance,
    test_normalization_layouts,
    test_softmax,
)


def _parameters(function: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """Every combination of what a test is parametrised by, the target excepted."""
    axes = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize" and mark.args[0] != "target":
            names = [name.strip() for name in mark.args[0].split(",")]
            axes.append(
                [dict(zip(names, values if len(names) > 1 else (values,), strict=True)) for values in mark.args[1]]
            )
    for combination in itertools.product(*axes):
        yield {name: value for part in combination for name, value in part.items()}


def _tests(module: ModuleType) -> Iterator[Any]:
    for name, function in inspect.getmembers(module, inspect.isfunction):
        # Threads of the host have no part in an emulated kernel.
        takes_target = name.startswith("test_") and "target" in inspect.signature(function).parameters
        if takes_target and "thread_count" not in name:
            yield pytest.param(function, id=f"{module.__name__.removeprefix('test_')}-{name.removeprefix('test_')}")


@pytest.mark.parametrize("function", [test for module in MODULES for test in _tests(module)])
def test_emulated(function, monkeypatch):
    fixtures = {"monkeypatch": monkeypatch} if "monkeypatch" in inspect.signature(function).parameters else {}
    with emulation_support.cuda_serves_the_cpu():
        for number, parameters in enumerate(_parameters(function)):
            emulation_support.set_seed(number)
            function(target=Target("cuda", "cpu"), **fixtures, **parameters)
