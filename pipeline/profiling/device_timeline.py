"""Whose time a step was: waits over all ranks, and idle time of a device that works through a queue.

On a synchronous device (a CPU) a step returns when it is done, and the host's clocks are exact. On a GPU the host only
launches a step: `step()` returns after a few milliseconds, and the device works through a queue. A wait for the next
batch then costs nothing as long as the device has work. `device_idle` replays the queue: every step adds
`device_step_s` seconds of work, host time consumes it, and only host time that passes with an empty queue is idle time.
It needs nothing but the host's clocks. CUDA events measure the same gaps directly (`StepClocks.idle_by_events`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.profiling.clocks import LoopTotals, StepTiming
from pipeline.profiling.group import Group


@dataclass(frozen=True)
class IdleTime:
    """Seconds for which the device had no work during a loop, by what the host did meanwhile.

    Attributes:
        wait_s: for each step, while the host waited in next() for the batch.
        launch_s: for each step, while the host was still launching it: the host launches more slowly than the device
            works, or steps take longer than `device_step_s` and the host waits for a place in the queue.
        rest_s: for each step, while the host did anything else before the next one (a callback, logging).
    """

    wait_s: tuple[float, ...]
    launch_s: tuple[float, ...]
    rest_s: tuple[float, ...]


def device_idle(host_s: Iterable[tuple[float, float, float]], device_step_s: float) -> IdleTime:
    """Replays the device's queue against the host's clocks. The device has no work at the start.

    Args:
        host_s: for each step the host's seconds in next(), in launching the step, and until the next step.
        device_step_s: seconds of device time that a step takes, from a loop on replayed batches.

    Returns:
        The idle seconds. If every one of N steps takes `device_step_s`, the idle time plus N * `device_step_s` is the
        duration of the loop with the final wait for the device.
    """
    idle_s = list[tuple[float, float, float]]()
    queued_s = 0.0

    def idle_during(seconds: float) -> float:
        """Lets host time pass; returns for how long of it the device had no work."""
        nonlocal queued_s
        idle = max(0.0, seconds - queued_s)
        queued_s = max(0.0, queued_s - seconds)
        return idle

    for wait_s, launch_s, rest_s in host_s:
        while_waiting = idle_during(wait_s)
        queued_s += device_step_s
        idle_s.append((while_waiting, idle_during(launch_s), idle_during(rest_s)))
    waits, launches, rests = zip(*idle_s, strict=True) if idle_s else ((), (), ())
    return IdleTime(waits, launches, rests)


def idle_totals(clocks: LoopTotals, steps: Sequence[StepTiming], device_step_s: float, group: Group) -> LoopTotals:
    """The totals of a loop on an asynchronous device, with waits and rests only as far as the device was idle.

    The device of one rank may still have work while that of another waits for a batch, and ranks wait for one another
    at every step. So a step's wait is the longest idle wait of all ranks.

    Args:
        clocks: this rank's totals by the host's clocks, with the final wait for the device.
        steps: this rank's steps by the host's clocks; every rank has as many.
        device_step_s: seconds of device time that a step takes, from a loop on replayed batches.
        group: the ranks.

    Returns:
        The same images and `elapsed_s`. `step_s` is whatever is neither idle wait nor idle rest: the device's work, and
        the time that it waits for launches.
    """
    idle = device_idle(((step.wait_s, step.step_s, step.rest_s) for step in steps), device_step_s)
    wait_s = sum(_longest_waits_s(idle.wait_s, group))
    step_s = max(0.0, clocks.elapsed_s - wait_s - sum(idle.rest_s))
    return replace(clocks, wait_s=wait_s, step_s=step_s)


def attribute_waits(clocks: LoopTotals, steps: list[StepTiming], group: Group) -> tuple[LoopTotals, list[StepTiming]]:
    """Counts the longest wait of all ranks as the wait of each step, on synchronous devices.

    While one rank waits for its batch, the others wait for that rank, but within their training step. That time is
    moved from `step_s` to `wait_s`.

    Args:
        clocks: this rank's totals of the steps.
        steps: this rank's steps; every rank has as many.
        group: the ranks.
    """
    waits_s = _longest_waits_s([step.wait_s for step in steps], group)
    shifted = [
        replace(step, wait_s=wait_s, step_s=max(0.0, step.step_s - (wait_s - step.wait_s)))
        for step, wait_s in zip(steps, waits_s, strict=True)
    ]
    wait_s = sum(waits_s)
    return replace(clocks, wait_s=wait_s, step_s=clocks.step_s - (wait_s - clocks.wait_s)), shifted


def _longest_waits_s(waits_s: Iterable[float], group: Group) -> list[float]:
    """For each step the longest wait of all ranks."""
    return [group.largest(round(1e9 * wait_s)) / 1e9 for wait_s in waits_s]
