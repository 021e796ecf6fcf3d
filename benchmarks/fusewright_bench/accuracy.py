"""Error of a provider against the float64 oracle, on the inputs that are timed."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fusewright.testing import budget_of, error_in_u, unit
from fusewright_bench.case import Case, Inputs, Outputs, grad_outputs_of
from fusewright_bench.harness import synchronize

# Rounding a result once already costs about this much. Two errors below it are both as good as exact, and their
# quotient says nothing.
ROUNDING_U = 0.5

# An error of this share of the result, where plain PyTorch has much less, is no rounding: the answer is another one.
# That of float32 leaves room for products in TF32 and in bfloat16.
WRONG_SHARE = {torch.float32: 0.005, torch.float16: 0.02, torch.bfloat16: 0.05}
WRONG_FACTOR = 16.0

Results = dict[str, Tensor]


class Evaluation(NamedTuple):
    """What a provider computed, and how long its call took; the first time, that is its first-call time."""

    results: Results
    seconds: float


def evaluate(case: Case, forward: Callable[[], Outputs], inputs: Inputs) -> Evaluation:
    """Run ``forward`` and, unless the mode is forward, one backward of it.

    Results are the outputs by name and the gradients as ``grad_<input>``; of a backward alone, only gradients.
    """
    device = next(iter(inputs.values())).device
    start = time.perf_counter()
    outputs = forward()
    synchronize(device)
    seconds = time.perf_counter() - start
    named = {} if case.mode == "bwd" else dict(zip(case.operation.outputs, outputs, strict=True))
    if case.mode != "fwd":
        names = case.operation.differentiable
        leaves, grad_outputs = [inputs[name] for name in names], grad_outputs_of(outputs, case.dtype)
        synchronize(device)
        start = time.perf_counter()
        gradients = torch.autograd.grad(outputs, leaves, grad_outputs)
        synchronize(device)
        seconds += time.perf_counter() - start
        named |= {f"grad_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return Evaluation({name: tensor.detach() for name, tensor in named.items()}, seconds)


def oracle_of(case: Case, inputs: Inputs) -> Results:
    """The results of the plain formula in float64, from the same rounded inputs and output gradients."""
    wide = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    return evaluate(case, partial(case.operation.formula, wide), wide).results


def errors_in_u(results: Results, oracle: Results) -> dict[str, float]:
    """Error of every tensor in units u of its dtype, by name; infinite where NaN stands in one of the two."""
    return {name: error_in_u(tensor, oracle[name]) for name, tensor in results.items()}


def error_ratio(errors: dict[str, float], plain: dict[str, float]) -> float:
    """The largest quotient of a tensor's error and plain PyTorch's, both taken as at least ``ROUNDING_U``."""
    return max(max(error, ROUNDING_U) / max(plain[name], ROUNDING_U) for name, error in errors.items())


def wrong_results(errors: dict[str, float], plain: dict[str, float], dtype: torch.dtype) -> list[str]:
    """The tensors that are no approximation of the oracle's, by name; ``plain`` may lack some or all of them."""
    wrong_u = WRONG_SHARE[dtype] / unit(dtype)
    return [name for name, error in errors.items() if not error <= max(wrong_u, WRONG_FACTOR * plain.get(name, 0.0))]


def within_budget(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether no tensor's error passes what a kernel of ours is allowed, in the forward or in a gradient."""
    budget = budget_of(dtype)
    return all(
        error <= budget.of("gradient" if name.startswith("grad_") else "forward") for name, error in errors.items()
    )
