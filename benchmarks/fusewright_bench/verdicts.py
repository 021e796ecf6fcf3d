"""Medians, bootstrap intervals and the verdict of a comparison."""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch

RESAMPLES = 2000
CONFIDENCE = 0.95
# A provider is FASTER or SLOWER only where the whole interval of its speed-up lies outside this band, and SAME where
# the whole interval lies inside. Two runs of the same code on a shared machine differ by up to about 3 percent.
SAME_BAND = (0.97, 1.03)
# Two processes lay the same tensors out on other pages, which alone moves a speed-up by some percent, the same in every
# round: no interval of one run knows of it.
BETWEEN_RUNS_BAND = (0.95, 1.05)

FASTER, SAME, SLOWER, UNCLEAR = "FASTER", "SAME", "SLOWER", "UNCLEAR"


class Interval(NamedTuple):
    low: float
    high: float


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the median, at 95 percent; the same values give the same interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    medians = sample[picks].quantile(0.5, dim=1)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = medians.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def paired_ratios(baseline: Sequence[float], candidate: Sequence[float]) -> list[float]:
    """Baseline time over candidate time, one value per ABBA pair of rounds; above 1 the candidate is faster.

    The geometric mean over the two rounds of a pair cancels a drift of the machine that is linear in time.
    """
    per_round = [base / other for base, other in zip(baseline, candidate, strict=True)]
    return [math.sqrt(first * second) for first, second in zip(per_round[0::2], per_round[1::2], strict=True)]


def verdict(interval: Interval, band: tuple[float, float] = SAME_BAND) -> str:
    """FASTER, SAME, SLOWER or UNCLEAR, from the interval of a speed-up."""
    if interval.low > band[1]:
        return FASTER
    if interval.high < band[0]:
        return SLOWER
    if interval.low >= band[0] and interval.high <= band[1]:
        return SAME
    return UNCLEAR


class Comparison(NamedTuple):
    ratio: float
    interval: Interval
    verdict: str


def compare(baseline: Sequence[float], candidate: Sequence[float]) -> Comparison:
    """Speed-up of the candidate over the baseline, from the times of the same rounds."""
    ratios = paired_ratios(baseline, candidate)
    interval = bootstrap_interval(ratios)
    return Comparison(median(ratios), interval, verdict(interval))
