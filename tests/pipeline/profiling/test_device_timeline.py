"""Idle time from the host's clocks is that of the simulated device, and agrees with its events."""

from __future__ import annotations

import numpy as np
import pytest

from model.device_clock import DeviceClock
from pipeline.profiling.clocks import LoopTotals, StepClocks, StepTiming
from pipeline.profiling.device_timeline import device_idle, idle_totals
from pipeline.profiling.group import SINGLE_PROCESS, SingleProcess
from tests.support.simulated_training import SimulatedDevice, SimulatedEvent, VirtualClock

STEP_S = 0.017


def random_host_times(seed: int, steps: int = 200) -> list[tuple[float, float, float]]:
    """Seconds of waiting, launching and the rest, in every proportion to the device's 17 ms."""
    rng = np.random.default_rng(seed)
    most = rng.uniform(0.001, 0.04, 3)
    return [tuple(row) for row in rng.uniform(0, most, (steps, 3)).tolist()]


def run(host_s: list[tuple[float, float, float]]) -> tuple[VirtualClock, SimulatedDevice]:
    """A loop with these times on a device whose queue has no limit."""
    clock = VirtualClock()
    device = SimulatedDevice(clock, max_pending=10**6)
    for wait_s, launch_s, rest_s in host_s:
        clock.advance(wait_s)
        device.launch_s = launch_s
        device.step(STEP_S)
        clock.advance(rest_s)
    device.settle()
    return clock, device


@pytest.mark.parametrize("seed", range(20))
def test_idle_time_and_work_are_the_duration(seed: int):
    """Whatever the host does: all idle time plus 17 ms a step, with the rest after the last step, is the loop."""
    host_s = random_host_times(seed)
    clock, _ = run(host_s)
    idle = device_idle(host_s, STEP_S)
    assert sum((*idle.wait_s, *idle.launch_s, *idle.rest_s)) + STEP_S * len(host_s) == pytest.approx(clock())


@pytest.mark.parametrize("seed", range(20))
def test_each_gap_is_the_device_s_own(seed: int):
    """If launches are quicker than steps, a gap on the device is what the rest before it and the wait leave idle."""
    host_s = [(wait_s, min(launch_s, STEP_S), rest_s) for wait_s, launch_s, rest_s in random_host_times(seed)]
    _, device = run(host_s)
    idle = device_idle(host_s, STEP_S)
    gaps_s = [rest_s + wait_s for rest_s, wait_s in zip((0.0, *idle.rest_s), idle.wait_s, strict=False)]
    assert gaps_s == pytest.approx(device.idle_s, abs=1e-9)


def test_waits_that_the_queue_covers_cost_nothing():
    """A step of 17 ms covers 13 ms of waiting after a launch of 4 ms, and 3 ms more are idle."""
    covered = device_idle([(0.0, 0.004, 0.0), (0.013, 0.004, 0.0)], STEP_S)
    assert covered.wait_s == pytest.approx((0.0, 0.0))
    late = device_idle([(0.0, 0.004, 0.0), (0.016, 0.004, 0.0)], STEP_S)
    assert late.wait_s == pytest.approx((0.0, 0.003))


def test_no_steps_leave_nothing_idle():
    assert device_idle([], STEP_S).wait_s == ()


def test_another_rank_s_idle_wait_counts():
    """This rank's device is never idle by its own clocks; the other's waits 2 ms for its batch in every step."""

    class Other(SingleProcess):
        def largest(self, number: int) -> int:
            return max(number, 2 * 10**6)

    steps = [StepTiming(0.0, 0.0, STEP_S, 0.0)] * 3
    clocks = LoopTotals(24, 0.0, 0.057, 0.057)
    assert idle_totals(clocks, steps, STEP_S, SINGLE_PROCESS) == LoopTotals(24, 0.0, pytest.approx(0.057), 0.057)
    assert idle_totals(clocks, steps, STEP_S, Other()) == LoopTotals(
        24, pytest.approx(0.006), pytest.approx(0.051), 0.057
    )


@pytest.mark.parametrize("late_s", [0.0, 0.004])
def test_events_say_whose_gaps_they_are(late_s: float):
    """The input is 4 ms late in every step, beyond what the queue covers; a callback that reads the loss takes 5 ms."""
    clock, clocks = VirtualClock(), StepClocks()
    device = SimulatedDevice(clock)
    events = DeviceClock(lambda: SimulatedEvent(device))
    for number in range(50):
        began_s = clock()
        wait_s = late_s if number else 1.0
        clock.advance(wait_s)
        stepped_s = clock()
        events.begin()
        device.step(STEP_S)
        events.end()
        launched_s = clock()
        device.settle()
        clock.advance(0.005)
        clocks.add(8, wait_s, launched_s - stepped_s, clock() - began_s)
        for times in events.passed():
            clocks.add_device(times.gap_s, times.step_s, times.steps)
    idle_s = clocks.idle_by_events()
    assert idle_s == pytest.approx((49 * late_s, 49 * 0.005))


def test_without_events_there_is_no_idle_time_by_events():
    assert StepClocks().idle_by_events() is None


def test_steps_measured_as_one_keep_gaps_and_waits_in_order():
    """The wait of the fourth step belongs to the gap before it, although the second and third were measured as one."""
    clocks = StepClocks()
    for wait_s in (9.0, 0.0, 0.0, 0.5):
        clocks.add(8, wait_s, 0.1, 1.0)
    for gap_s, steps in ((None, 1), (0.2, 2), (0.7, 1)):
        clocks.add_device(gap_s, 0.1, steps)
    assert clocks.idle_by_events() == pytest.approx((0.5, 0.4))
