"""When the device works and when it idles, by its own clock.

On a GPU the host's clocks do not say: kernels are queued, and the host is through with a step long before the device
is. So events are recorded on the training stream around every step, and read when the device has passed them.

The gap before a step is the time from the end of the step before to its start: the device had nothing to train on.

    a gap, and the host waited in next()    the input was late
    a gap, and it did not wait              the host was late with the launch: a callback, logging, a loss read back
    no gap, though it waited                the kernels in the queue covered the wait, which cost nothing

Kernels launched too slowly *within* a step make its `step_s` longer, and no gap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

IN_FLIGHT = 64  # steps; a GPU's queue of launches holds fewer


class Event(Protocol):
    """What the clock needs of `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None:
        """Puts it into the queue of the device, behind all work so far; once more moves it."""
        ...

    def query(self) -> bool:
        """Whether the device has passed it; never waits."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has passed it."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from it to `end`, both passed."""
        ...


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds on the device.

    Attributes:
        gap_s: from the end of the step before; None for the first one, and the first one after `finish`.
        step_s: of the step.
        steps: 1; more where the device was `in_flight` steps behind: these were measured as one, gaps and all.
    """

    gap_s: float | None
    step_s: float
    steps: int = 1


@dataclass
class _Pair:
    begin: Event
    end: Event
    steps: int = 1


class DeviceClock:
    """Measures steps on the device. Of a stretch, which `finish` ends, gaps and steps add up to the time from its first
    begin to its last end. Only `finish` waits.

    Args:
        make_event: gives a fresh event.
        in_flight: steps that are measured but not yet passed, at most; a further one is measured with the last of them.
    """

    def __init__(self, make_event: Callable[[], Event], in_flight: int = IN_FLIGHT) -> None:
        assert in_flight > 0
        self._make_event, self._in_flight = make_event, in_flight
        self._pending: deque[_Pair] = deque()
        self._begun: Event | None = None
        self._ended: Event | None = None  # the end of the last step that was read, in this stretch

    def begin(self) -> None:
        """Before a step's first kernel."""
        if len(self._pending) < self._in_flight:
            self._begun = self._make_event()
            self._begun.record()

    def end(self) -> None:
        """Behind its last one."""
        if self._begun is None:
            self._pending[-1].steps += 1
        else:
            self._pending.append(_Pair(self._begun, self._make_event()))
            self._begun = None
        self._pending[-1].end.record()

    def passed(self) -> list[DeviceTimes]:
        """The steps that the device has passed and that were not yet read, in order. Not between begin and end."""
        assert self._begun is None
        read = list[DeviceTimes]()
        while self._pending and self._pending[0].end.query():
            pair = self._pending.popleft()
            gap_s = None if self._ended is None else self._ended.elapsed_time(pair.begin) / 1000
            self._ended = pair.end
            read.append(DeviceTimes(gap_s, pair.begin.elapsed_time(pair.end) / 1000, pair.steps))
        return read

    def finish(self) -> list[DeviceTimes]:
        """All that are left; waits for them. The next step begins a new stretch, without a gap before it."""
        if self._pending:
            self._pending[-1].end.synchronize()
        left = self.passed()
        assert not self._pending
        self._ended = None
        return left


def device_clock(device: torch.device) -> DeviceClock | None:
    """The clock of a GPU's current stream; None on the CPU, where the host's clocks say it all."""
    if device.type != "cuda":
        return None
    return DeviceClock(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
