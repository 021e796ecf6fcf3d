"""The machine as pytest-benchmark's files describe it, and which of the suite's cases it runs."""

from typing import Any

import pytest
import torch

from fusewright_bench import environment
from fusewright_bench.case import SUITES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=SUITES, default=SUITES[0], help="whose cases run; default %(default)s")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["fusewright"] = environment.capture(device, (torch.get_num_threads(),))
