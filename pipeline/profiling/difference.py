"""Confidence interval of the relative change between two measurements, each the mean of repeated windows.

By Welch's t-test on relative errors: both measurements may have different spreads and different numbers of windows. It
covers what varies within a measurement. What varies between two of them (another machine, warmer memory) is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Spread:
    """How well a mean is known.

    Attributes:
        relative_error: standard error of the mean, over the mean.
        freedom: degrees of freedom: one less than the number of windows.
    """

    relative_error: float
    freedom: int


def spread_of_values(values: Sequence[float]) -> Spread:
    """The spread of the mean of at least two positive values."""
    return Spread(stdev(values) / sqrt(len(values)) / fmean(values), len(values) - 1)


def spread_of_interval(mean: float, low: float, high: float, windows: int, level: float) -> Spread:
    """The spread behind Student's confidence interval of the mean of `windows` values; see `confidence.Interval`."""
    factor = float(stdtrit(windows - 1, (1 + level) / 2))
    return Spread((high - low) / 2 / factor / mean, windows - 1)


def change_interval(change: float, before: Spread, after: Spread, level: float = 0.95) -> tuple[float, float]:
    """Both ends of the confidence interval of a relative change.

    Args:
        change: after / before - 1.
        before: spread of the first mean.
        after: spread of the second mean.
        level: probability that the interval holds the true change.
    """
    parts = [(spread.relative_error**2, spread.freedom) for spread in (before, after)]
    squared = sum(part for part, _ in parts)
    if squared == 0:
        return change, change
    freedom = squared**2 / sum(part**2 / number for part, number in parts)  # Welch-Satterthwaite
    half = float(stdtrit(freedom, (1 + level) / 2)) * sqrt(squared)
    return (1 + change) * exp(-half) - 1, (1 + change) * exp(half) - 1
