"""The confidence interval of a mean of repeated windows, by Student's t distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """The mean of repeated measurements and its confidence interval.

    Attributes:
        mean: the mean of the measured values.
        low: lower end of the interval.
        high: upper end of the interval.
        windows: number of values.
        level: probability that the interval holds the true mean, e.g. 0.95.
    """

    mean: float
    low: float
    high: float
    windows: int
    level: float

    def __str__(self) -> str:
        return f"{self.level:.0%} confidence interval {self.low:.1%} to {self.high:.1%}, from {self.windows} rounds"


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's confidence interval of the mean of independent `values`.

    Raises:
        ValueError: there are fewer than two values, which show no spread.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} window, expected at least 2: one shows no spread")
    mean = fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * stdev(values) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values), level)
