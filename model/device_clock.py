"""Times of training steps on the GPU, measured with CUDA events.

Host clocks cannot measure a GPU: kernels are queued, and the host finishes a step long before the device does. So
events are recorded on the training stream around every step, and read once the device has passed them.

The gap before a step is the time from the end of the previous step to its start. The device had nothing to train on:

    a gap, and the host waited in next()    the input was late
    a gap, and the host did not wait        the host launched late: a callback, logging, reading a loss back
    no gap, although the host waited        kernels in the queue covered the wait, so it cost nothing

Kernels that are launched too slowly *within* a step make its `step_s` longer; they make no gap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MAX_PENDING_STEPS = 64  # a GPU's launch queue holds fewer


class Event(Protocol):
    """The part of `torch.cuda.Event(enable_timing=True)` that the clock needs."""

    def record(self) -> None:
        """Puts the event into the device's queue, behind all work so far. A second call moves it."""
        ...

    def query(self) -> bool:
        """Whether the device has passed the event; never waits."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has passed the event."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this event to `end`; the device must have passed both."""
        ...


@dataclass(frozen=True)
class DeviceTimes:
    """Times of one step on the device, in seconds.

    Attributes:
        gap_s: time since the end of the previous step; None for the first step and the first one after `finish`.
        step_s: duration of the step.
        steps: 1. It is larger if the device was `max_pending` steps behind: these steps were measured as one, with the
            gaps between them.
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
    """Measures steps on the device.

    Within a stretch of steps, which `finish` ends, gaps and steps add up to the time from the first begin to the last
    end. Only `finish` waits.

    Args:
        make_event: returns a new event.
        max_pending: number of measured steps that the device has not yet passed. When it is reached, a further step is
            measured together with the last pending one, so that events cannot pile up.
    """

    def __init__(self, make_event: Callable[[], Event], max_pending: int = MAX_PENDING_STEPS) -> None:
        assert max_pending > 0
        self._make_event, self._max_pending = make_event, max_pending
        self._pending: deque[_Pair] = deque()
        self._begun: Event | None = None
        self._ended: Event | None = None  # the end of the last step that was read, in this stretch

    def begin(self) -> None:
        """Call before the first kernel of a step."""
        if len(self._pending) < self._max_pending:
            self._begun = self._make_event()
            self._begun.record()

    def end(self) -> None:
        """Call after the last kernel of a step."""
        if self._begun is None:
            self._pending[-1].steps += 1
        else:
            self._pending.append(_Pair(self._begun, self._make_event()))
            self._begun = None
        self._pending[-1].end.record()

    def passed(self) -> list[DeviceTimes]:
        """The steps that the device has passed since the last call, in order. Do not call between begin and end."""
        assert self._begun is None
        read = list[DeviceTimes]()
        while self._pending and self._pending[0].end.query():
            pair = self._pending.popleft()
            gap_s = None if self._ended is None else self._ended.elapsed_time(pair.begin) / 1000
            self._ended = pair.end
            read.append(DeviceTimes(gap_s, pair.begin.elapsed_time(pair.end) / 1000, pair.steps))
        return read

    def finish(self) -> list[DeviceTimes]:
        """Waits for all pending steps and returns them. The next step begins a new stretch and has no gap."""
        if self._pending:
            self._pending[-1].end.synchronize()
        remaining = self.passed()
        assert not self._pending
        self._ended = None
        return remaining


def device_clock(device: torch.device) -> DeviceClock | None:
    """The clock of a GPU's current stream; None on the CPU, where host clocks measure everything."""
    if device.type != "cuda":
        return None
    return DeviceClock(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
