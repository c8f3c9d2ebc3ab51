"""The planned time of each check of tools/gpu_check.py, so that all end before a limit. What is left out is named."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


class Amounts(Protocol):
    """How much is measured: see `Scale` of tools/gpu_check.py."""

    @property
    def replay_batches(self) -> tuple[int, ...]:
        """Batch sizes."""
        ...

    @property
    def hw_decoder_loads(self) -> tuple[float, ...]:
        """Shares of the JPEG engines."""
        ...

    @property
    def threads(self) -> tuple[int, ...]:
        """Threads of the loader."""
        ...

    @property
    def window_s(self) -> float:
        """Seconds of a window."""
        ...

    @property
    def rounds(self) -> int:
        """Windows of each setting."""
        ...

    @property
    def switches_s(self) -> float:
        """Seconds of all windows of the switches, at one batch size, of the trainer and again of the loader."""
        ...


def planned_s(scale: Amounts, sets: int, precisions: int) -> dict[str, float]:
    """Seconds that each check takes at most by plan, on a machine with one GPU and 16 cores.

    Args:
        scale: how much is measured.
        sets: shard sets.
        precisions: precisions of the training step.
    """
    loaders, batches = len(scale.hw_decoder_loads) + len(scale.threads), len(scale.replay_batches)
    window_s = scale.window_s + 0.3  # with the batches that do not count, and the start of a pipeline
    return {
        "pixels": 10.0,
        "engines": 10 * scale.window_s,
        "switches": batches * (2 * scale.switches_s + 15.0),
        "tests": 100.0,
        "together": precisions * (25.0 + 6 * scale.window_s),
        "supply": sets * loaders * scale.rounds * window_s,
        "pair": 40.0,
        "demand": 2 * batches * precisions * (scale.rounds * scale.window_s + 1.0),
        "shares": 2.0 * precisions,
    }


@dataclass(frozen=True)
class TimePlan:
    """Seconds that each check is planned to take, and the limit of all together.

    Attributes:
        planned_s: seconds by check.
        limit_s: of the whole run.
        clock: gives the time in seconds.
        started_s: when the run began, by `clock`.
    """

    planned_s: Mapping[str, float]
    limit_s: float
    clock: Callable[[], float]
    started_s: float

    @classmethod
    def begun(
        cls, planned_s: Mapping[str, float], limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> TimePlan:
        """A plan whose time runs from now on."""
        return cls(planned_s, limit_s, clock, clock())

    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.limit_s - (self.clock() - self.started_s)

    def no_time_for(self, name: str) -> str | None:
        """Why a check is left out; None if its planned time is left."""
        left_s, planned_s = self.left_s(), self.planned_s[name]
        if planned_s <= left_s:
            return None
        return (
            f"it is planned to take {planned_s:.0f} s, and {max(0.0, left_s):.0f} s are left; run it with --only {name}"
        )

    def __str__(self) -> str:
        total_s = sum(self.planned_s.values())
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.planned_s.items())
        return f"planned seconds: {parts}; {total_s:.0f} of {self.limit_s:.0f}"
