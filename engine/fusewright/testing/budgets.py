"""What error is allowed, in u of the result's dtype, and the verdict on one result.

A correctly rounded low-precision result has an error of about 0.8u and a float32 result of a two-pass formula one of
1 to 3u; derived tolerances such as those of ``torch.testing`` are a thousand times looser and find nothing.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusewright.testing.errors import error_in_u, max_element_error_in_u, rms

Direction = Literal["forward", "gradient"]

ELEMENT_FACTOR = 24.0
"""No single element may be wrong by more than this many budgets."""

PLAIN_FACTOR = 2.0
"""No result may be worse than this many times plain PyTorch in the same dtypes."""

RESULT_ROUNDING = 1.0
TERMS_ROUNDING = 2.0
"""Errors below these, those of the last few roundings, are not compared with plain PyTorch's: a constant row, say, may
come out exact by the order in which it happens to be summed. The terms' roundings count as far as the terms do."""


@dataclass(frozen=True)
class Budget:
    """Allowed error in u of a forward result and of a gradient."""

    forward: float
    gradient: float

    def of(self, direction: Direction) -> float:
        return self.forward if direction == "forward" else self.gradient

    def for_logits(self, largest: float) -> "Budget":
        """The budget where exp is taken of logits up to ``largest`` in size: their rounding grows with them."""
        return self.scaled(max(1.0, largest / 16.0))

    def scaled(self, factor: float) -> "Budget":
        return Budget(self.forward * factor, self.gradient * factor)


BUDGETS = {
    torch.float64: Budget(16.0, 24.0),
    torch.float32: Budget(16.0, 24.0),
    torch.bfloat16: Budget(2.0, 5.0),
    torch.float16: Budget(2.0, 5.0),
}


def budget_of(dtype: torch.dtype, *, interpreted: bool = False) -> Budget:
    """The budget for results of ``dtype``.

    ``interpreted``: the result comes from Triton's interpreter, which truncates float32 to bfloat16 where hardware
    rounds to nearest.
    """
    if dtype not in BUDGETS:
        raise TypeError(f"dtype is {dtype}, expected float64, float32, bfloat16 or float16")
    return BUDGETS[dtype].scaled(2.0) if interpreted and dtype is torch.bfloat16 else BUDGETS[dtype]


@dataclass(frozen=True)
class Judgement:
    """One result against its budget. Errors in u; ``plain_error`` is that of plain PyTorch, None if not asked."""

    error: float
    max_element_error: float
    budget: float
    plain_error: float | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def judge(
    actual: Tensor,
    oracle: Tensor,
    direction: Direction = "forward",
    *,
    magnitude: float | None = None,
    plain: Tensor | None = None,
    budget: Budget | None = None,
) -> Judgement:
    """Judge ``actual`` by its float64 ``oracle``: by budget, by largest element, and by ``plain`` PyTorch if given.

    ``magnitude`` is as in :func:`error_in_u`; ``budget`` defaults to that of the result's dtype.
    """
    allowed = (budget or budget_of(actual.dtype)).of(direction)
    error = error_in_u(actual, oracle, magnitude)
    element = max_element_error_in_u(actual, oracle, magnitude)
    plain_error = None if plain is None else error_in_u(plain.to(actual.dtype), oracle, magnitude)
    floor = _rounding_floor(actual.dtype, rms(oracle), magnitude or 0.0)
    failures = []
    if not error <= allowed:
        failures.append(f"error {error:.3g}u is above the budget of {allowed:.3g}u")
    if not element <= ELEMENT_FACTOR * allowed:
        failures.append(f"an element is wrong by {element:.3g}u, above {ELEMENT_FACTOR:g} budgets of {allowed:.3g}u")
    if plain_error is not None and not error <= max(PLAIN_FACTOR * plain_error, floor):
        failures.append(f"error {error:.3g}u is above {PLAIN_FACTOR:g} times that of plain PyTorch, {plain_error:.3g}u")
    return Judgement(error, element, allowed, plain_error, tuple(failures))


def _rounding_floor(dtype: torch.dtype, size: float, magnitude: float) -> float:
    """The error that is not compared; a low-precision result of RMS ``size`` hides most of its terms' rounding."""
    if dtype in (torch.float32, torch.float64):
        return RESULT_ROUNDING + TERMS_ROUNDING
    share = magnitude / max(size, magnitude) if magnitude > 0.0 else 0.0
    return RESULT_ROUNDING + TERMS_ROUNDING * share


def assert_accurate(
    actual: Tensor,
    oracle: Tensor,
    direction: Direction = "forward",
    *,
    magnitude: float | None = None,
    plain: Tensor | None = None,
    budget: Budget | None = None,
    name: str = "result",
) -> Judgement:
    """:func:`judge`, raising ``AssertionError`` with every failure."""
    judgement = judge(actual, oracle, direction, magnitude=magnitude, plain=plain, budget=budget)
    if not judgement.passed:
        raise AssertionError(f"{name}: " + "; ".join(judgement.failures))
    return judgement
