"""The device clock on a simulated device: no time is lost or counted twice, and only `finish` waits."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import torch

from model.checkpoint import TrainState
from model.device_clock import DeviceClock, DeviceTimes, device_clock
from model.parallel.ranks import SINGLE_RANK, Ranks
from model.trainer import Hooks, LoopSettings, StepTimes, Trainer
from tests.support.rank_jobs import EPOCHS, SEED, STEPS, ignore, make, parts

OPTIMIZER_STEPS = STEPS + 2
IDLE_S, QUEUED, CYCLES = 0.05, 8, 40_000_000  # cycles: some 20 ms


class Device:
    """A simulated device. It works through its queue in order, in milliseconds of a clock that only `host` and waiting
    advance. All times are whole numbers, so that sums are exact."""

    def __init__(self) -> None:
        self.now = self.free = self.waited = 0

    def host(self, ms: int) -> None:
        """The host does other work."""
        self.now += ms

    def work(self, ms: int) -> None:
        """Queues work; the host continues at once."""
        self.free = max(self.now, self.free) + ms

    def event(self) -> DeviceEvent:
        """Like torch.cuda.Event(enable_timing=True)."""
        return DeviceEvent(self)


class DeviceEvent:
    """A simulated CUDA event."""

    def __init__(self, device: Device) -> None:
        self.device, self.at = device, -1

    def record(self) -> None:
        """Sets it to the present end of the queue."""
        self.at = max(self.device.now, self.device.free)

    def query(self) -> bool:
        """Whether the device has passed it."""
        assert self.at >= 0, "never recorded"
        return self.device.now >= self.at

    def synchronize(self) -> None:
        """Advances the clock, and counts by how much."""
        self.device.waited += max(0, self.at - self.device.now)
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end: DeviceEvent) -> float:
        """Times 1000, so that the seconds of the clock under test are milliseconds here."""
        assert self.query() and end.query(), "not ready"
        return 1000.0 * (end.at - self.at)


def stretch(device: Device, clock: DeviceClock, rng: random.Random, steps: int) -> tuple[list[DeviceTimes], int]:
    """Random steps, read at random times. Returns what was read, and the time from first begin to last end."""
    read: list[DeviceTimes] = []
    first = None
    for _ in range(steps):
        device.host(rng.choice((0, 0, 1, 30)))
        first = max(device.now, device.free) if first is None else first
        clock.begin()
        for _ in range(rng.randrange(3)):
            device.work(rng.randrange(20))
            device.host(rng.randrange(3))
        clock.end()
        if rng.random() < 0.4:
            read += clock.passed()
    last = max(device.now, device.free)
    assert device.waited == 0, "something waited before finish"
    read += clock.finish()
    device.waited = 0
    assert first is not None
    return read, last - first


@pytest.mark.parametrize("max_pending", [1, 2, 5, 64])
@pytest.mark.parametrize("seed", range(25))
def test_gaps_and_steps_add_up(seed: int, max_pending: int):
    """Their sum is the time from first begin to last end of every stretch, and every step counts once."""
    device, rng = Device(), random.Random(seed)
    clock = DeviceClock(device.event, max_pending)
    for _ in range(3):
        steps = rng.randrange(1, 30)
        read, total = stretch(device, clock, rng, steps)
        assert [times.gap_s is None for times in read] == [True] + [False] * (len(read) - 1)
        assert sum((times.gap_s or 0) + times.step_s for times in read) == total
        assert sum(times.steps for times in read) == steps
        assert all(times.step_s >= 0 and (times.gap_s or 0) >= 0 for times in read)
        assert max_pending < 64 or len(read) == steps
        device.host(1000)  # between stretches: in no gap
    assert clock.passed() == clock.finish() == []


def test_gaps_are_when_the_device_had_nothing_to_do():
    """Queued steps have no gap; a late host makes a gap as long as the device was idle."""
    device = Device()
    clock = DeviceClock(device.event)
    for late in (0, 0, 50):
        device.host(late)
        clock.begin()
        device.work(20)
        clock.end()
    assert clock.passed() == [DeviceTimes(None, 20.0), DeviceTimes(0.0, 20.0)]
    assert clock.passed() == []
    assert clock.finish() == [DeviceTimes(10.0, 20.0)]


def test_no_more_than_the_maximum_is_pending():
    """While the device passes no event, no further events are made; later steps are measured with the last one."""
    device, made = Device(), list[DeviceEvent]()

    def event() -> DeviceEvent:
        made.append(device.event())
        return made[-1]

    clock = DeviceClock(event, max_pending=3)
    for _ in range(10):
        clock.begin()
        device.work(5)
        clock.end()
        assert clock.passed() == []
    assert len(made) == 6
    assert clock.finish() == [DeviceTimes(None, 5.0), DeviceTimes(0.0, 5.0), DeviceTimes(0.0, 40.0, steps=8)]


def fitted(trainer: Trainer, batches: Iterator) -> tuple[list[DeviceTimes], list[dict], list[StepTimes]]:
    """What the loop passed to its hooks: device times, lines of metrics, host times."""
    device, lines, host = list[DeviceTimes](), list[dict](), list[StepTimes]()
    hooks = Hooks(lambda _, times: host.append(times), lines.append, ignore, ignore, bool, device.append)
    assert trainer.fit(batches, hooks)
    return device, lines, host


def loop_of(ranks: Ranks, optimizer_steps: int = OPTIMIZER_STEPS) -> Trainer:
    """A loop over an epoch and two steps, with a line every two steps and a checkpoint every three."""
    model, optimizer, towers = make(ranks)
    settings = LoopSettings(EPOCHS, STEPS, SEED, log_every=2, max_optimizer_steps=optimizer_steps, save_every=3)
    return Trainer(model, optimizer, settings, TrainState.start(), towers)


def test_the_loop_measures_every_step_once_and_no_gap_over_a_pause():
    """Steps after an epoch's end (5) or a checkpoint (3, 6) have no gap. On the CPU there is no device clock."""
    device, trainer = Device(), loop_of(SINGLE_RANK)

    def batches() -> Iterator:
        for batch in parts(SINGLE_RANK):
            device.work(7)  # before begin, so the clock counts it as a gap
            yield batch

    trainer.clock = DeviceClock(device.event)
    times, lines, _ = fitted(trainer, batches())
    assert [t.gap_s for t in times] == [None, 7, 7, None, 7, None, None]
    assert all(line["device_gap_s"] == 7 for line in lines if "device_gap_s" in line)
    assert any("device_gap_s" in line for line in lines)

    assert device_clock(SINGLE_RANK.device) is None
    times, lines, host = fitted(loop_of(SINGLE_RANK, 2), parts(SINGLE_RANK))
    assert not times and len(host) == 2 and "device_gap_s" not in lines[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_idle_gpu_shows_as_a_gap_and_a_busy_one_does_not():
    """The host sleeps after the device has finished: a gap. Then all steps are in the queue: no gaps."""
    clock = device_clock(torch.device("cuda"))
    for _ in range(2):
        clock.begin()
        torch.cuda._sleep(CYCLES)
        clock.end()
        torch.cuda.synchronize()
        time.sleep(IDLE_S)
    first, idle = clock.finish()
    assert first.gap_s is None and idle.gap_s >= IDLE_S * 0.99  # the clocks of host and device differ a little
    torch.cuda._sleep(CYCLES)  # gives the host time to queue the steps
    for _ in range(QUEUED):
        clock.begin()
        torch.cuda._sleep(CYCLES)
        clock.end()
    queued = clock.finish()
    assert len(queued) == QUEUED
    assert max(times.gap_s for times in queued[1:]) < min(times.step_s for times in queued) / 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_loop_on_a_gpu_has_device_times():
    ranks = Ranks(device=torch.device("cuda"))
    times, lines, host = fitted(loop_of(ranks), parts(ranks))
    assert len(times) == len(host) == OPTIMIZER_STEPS and all(t.step_s > 0 for t in times)
    assert any(line.get("device_gap_s", -1) >= 0 for line in lines)
