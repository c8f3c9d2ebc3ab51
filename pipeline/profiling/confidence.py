"""How sure a mean of repeated windows is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """The mean of `windows` values, and the range `low` to `high` that holds the true one at `level`."""

    mean: float
    low: float
    high: float
    windows: int
    level: float

    def __str__(self) -> str:
        return f"{self.level:.0%} within {self.low:.1%} to {self.high:.1%}, {self.windows} rounds"


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean of independent `values`. ValueError for fewer than two: they show no spread."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} window, expected at least 2: one shows no spread")
    mean = fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * stdev(values) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values), level)
