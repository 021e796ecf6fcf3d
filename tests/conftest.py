"""Set up before any test imports torch or Triton."""

import os

import pytest
import torch

# Triton decides at its import whether kernels are interpreted; without a GPU that is the only way to run them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny calls gain nothing from a second thread, and several test processes at once would wait for each other's. What
# depends on the number of threads sets it itself.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch finds none"))
