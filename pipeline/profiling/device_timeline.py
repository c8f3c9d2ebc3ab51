"""How long an asynchronous device had no work, from the host's clocks alone.

On a GPU the host only launches a training step: `step()` returns after a few milliseconds while the device works
through a queue. A host that then waits for the next batch costs nothing as long as the device still has work. This module
replays the queue: every step adds `device_step_s` seconds of work, host time consumes it, and only host time that is
left over when the queue is empty counts as idle. CUDA events measure the same gaps directly and take precedence where
they exist (model/device_clock.py); this model needs nothing but the clocks that every run has.

On a synchronous device (a CPU) the host's clocks are exact, and `device_idle` is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class IdleTime:
    """Seconds for which the device had no work during a loop, by what the host did meanwhile.

    Attributes:
        wait_s: per step, while the host waited in next() for the batch.
        launch_s: per step, while the host was still launching the step: it launches more slowly than the device works.
        rest_s: per step, while the host did anything else between steps (a callback, logging).
    """

    wait_s: tuple[float, ...]
    launch_s: tuple[float, ...]
    rest_s: tuple[float, ...]


def device_idle(host_s: Iterable[tuple[float, float, float]], device_step_s: float) -> IdleTime:
    """Replays the device's queue against the host's clocks; the device is idle at the start.

    Args:
        host_s: per step the host's seconds in next(), in launching the step, and between the steps.
        device_step_s: seconds of device time that a step takes, from a loop on replayed batches.

    Returns:
        The idle seconds. With D device seconds a step and N steps, the idle time plus N * D is the loop's duration
        including the final wait for the device, provided that every step takes D.
    """
    idle_s = list[tuple[float, float, float]]()
    queued_s = 0.0

    def passes(seconds: float) -> float:
        """Lets host time pass; returns for how long of it the device had no work."""
        nonlocal queued_s
        idle = max(0.0, seconds - queued_s)
        queued_s = max(0.0, queued_s - seconds)
        return idle

    for wait_s, launch_s, rest_s in host_s:
        while_waiting = passes(wait_s)
        queued_s += device_step_s
        idle_s.append((while_waiting, passes(launch_s), passes(rest_s)))
    waits, launches, rests = zip(*idle_s, strict=True) if idle_s else ((), (), ())
    return IdleTime(waits, launches, rests)
