"""Noticing in mid-run that training waits for its input: simulated series of waits and of the host's counters."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from pipeline.diagnosis.midrun import Block, Evidence, MidRunWatch, WaitMeter, WatchSettings, reason
from pipeline.host import Pressure
from pipeline.profiling.cpu_time import CpuUse

BLOCK_S, STEPS, STEP_BYTES = 5.0, 50, 2_000_000
CORES = 2.0


def evidence(
    neighbours: float = 0.0, cold: float = 0.0, io: float = 0.0, throttled: float = 0.0, swapped: int = 0
) -> Evidence:
    """What the counters show in a block.

    Args:
        neighbours: cores that other processes use.
        cold: share of the bytes that come from storage.
        io: share of the time in which some task waits for storage.
        throttled: share of the quota's periods in which the job is stopped.
        swapped: bytes from swap.
    """
    waiting_s = {"cpu": 0.2 * BLOCK_S, "io": io * BLOCK_S, "memory": 0.0}
    pressure = Pressure(BLOCK_S, 100, round(100 * throttled), throttled * BLOCK_S, waiting_s, swapped)
    groups_s = {"loader": 0.8 * BLOCK_S, "main": 0.5 * BLOCK_S, "others": 0.0}
    use = CpuUse(BLOCK_S, groups_s, 0.0, neighbours * BLOCK_S, pressure)
    return Evidence(use, round(cold * STEPS * STEP_BYTES), STEPS * STEP_BYTES)


def lines(series: Iterable[tuple[float, Evidence]], watch: MidRunWatch | None = None) -> list[tuple[int, str]]:
    """The lines of a run with these wait shares, with the number of the block after which each comes."""
    watch, found = watch or MidRunWatch(CORES), []
    for number, (share, seen) in enumerate(series):
        block = Block(number * STEPS + 1, (number + 1) * STEPS, share * BLOCK_S, BLOCK_S, seen)
        if line := watch.add(block):
            found.append((number, line))
    return found


def usual(blocks: int, share: float = 0.02, noise: float = 0.01, **seen: float) -> list[tuple[float, Evidence]]:
    """Blocks of a run that hardly waits."""
    draw = random.Random(blocks)
    return [(max(0.0, draw.gauss(share, noise)), evidence(**seen)) for _ in range(blocks)]


PLANTED = {
    "a neighbour": ({"neighbours": 1.1}, {}, "cores: other processes use 1.1 of 2, before 0.0"),
    "a cold cache": ({"cold": 0.9, "io": 0.5}, {}, "storage: 90% of the images' bytes come from storage at 18 MB/s"),
    "a slow disk": ({"cold": 1.0, "io": 0.9}, {"cold": 1.0, "io": 0.3}, "storage: some task waits for it in 90%"),
    "throttling": ({"throttled": 0.6}, {}, "cores: the CPU quota stops this job in 60% of its periods"),
    "swap": ({"swapped": 50 * 2**20, "io": 0.6}, {}, "memory: 200 MiB were read from swap"),
    "a job that reads the same disk": (
        {"neighbours": 0.9, "cold": 1.0, "io": 0.9},
        {"cold": 1.0, "io": 0.3},
        "storage: some task waits for it",
    ),
    "something else": ({}, {}, "neither cores, storage nor memory of this host show why"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_run_that_becomes_input_bound_says_so_once_with_its_part_and_once_when_it_is_over(name: str):
    during, before, why = PLANTED[name]
    series = usual(12, **before) + [(0.4, evidence(**during))] * 8 + usual(10, **before)
    (begun, over) = lines(series)
    assert begun[0] == 15 and over[0] == 23  # with the fourth block in a row
    assert "has become input-bound at step 601: it waits 40% of the time, before that 2%" in begun[1]
    assert why in begun[1]
    assert "no longer input-bound since step 1,001" in over[1] and "for 40 s it waited 40%" in over[1]


def test_there_is_no_line_without_a_change():
    """Noise of several sizes, also around the AU threshold; and a run that waits from its first step on."""
    for share, noise in ((0.0, 0.005), (0.02, 0.01), (0.05, 0.02), (0.15, 0.05), (0.5, 0.1), (0.9, 0.02)):
        assert lines(usual(400, share, noise)) == [], (share, noise)


def test_short_disturbances_say_nothing():
    """A few blocks: an epoch's edge, a backup, a burst."""
    series = usual(10)
    for _ in range(20):
        series += [(0.6, evidence(neighbours=1.0))] * 3 + usual(5)
    assert lines(series) == []


def test_blocks_of_a_slow_run_are_long_and_fewer_confirm_a_change():
    """A logging interval of 30 s is a block."""
    watch, found = MidRunWatch(CORES), []
    for number in range(10):
        late = number >= 7
        block = Block(20 * number + 1, 20 * number + 20, 27.0 if late else 0.1, 30.0 if late else 5.0, evidence())
        found.append(watch.add(block) is not None)
    assert found.index(True) == 8 and sum(found) == 1


def test_waits_within_the_au_threshold_say_nothing():
    assert lines(usual(10, 0.0, 0.0) + usual(50, 0.045, 0.001)) == []
    begun = lines(usual(10, 0.0, 0.0) + usual(50, 0.09, 0.001))
    assert len(begun) == 1
    lenient = MidRunWatch(CORES, WatchSettings(au_threshold=0.8))
    assert lines(usual(10, 0.0, 0.0) + usual(50, 0.09, 0.001), lenient) == []


def test_waits_between_both_limits_change_nothing():
    """Hysteresis: a level that hovers around the limit gives one line, not one for each crossing."""
    watch = MidRunWatch(CORES)
    wandering = [(share, evidence()) for _ in range(30) for share in [0.09] * 5 + [0.06] * 5]
    assert len(lines(usual(10) + wandering, watch)) == 1 and watch.input_bound


def test_a_slow_start_does_not_hide_what_comes_later():
    """The first epoch read a cold set; later ones did not, until other processes came."""
    series = [(0.5, evidence(cold=1.0))] * 30 + usual(30) + [(0.4, evidence(neighbours=1.0))] * 10
    ((at, line),) = lines(series)
    assert at == 63 and "it waits 40% of the time, before that 2%; cores: other processes use 1.0 of 2" in line


def test_a_run_can_become_input_bound_again():
    """Later spells must last longer before they give a line, so that a run with long waves gives few."""
    spell = [(0.4, evidence(neighbours=1.0))]
    assert len(lines(usual(8) + spell * 5 + usual(8) + spell * 9 + usual(8))) == 4
    assert len(lines(usual(8) + (spell * 6 + usual(8)) * 50)) == 2


def test_a_folder_whose_reads_are_not_counted_shows_by_the_pressure():
    """FUSE: the kernel counts no bytes as read from storage, so none are named."""
    assert reason(evidence(io=0.3), evidence(io=0.01), CORES) == (
        "storage: some task waits for it in 30% of the time, before 1%"
    )
    both = reason(evidence(io=0.6, cold=1.0), evidence(io=0.1, cold=1.0), CORES)
    assert both.endswith("; it gives 20 MB/s, before 20")


def test_two_reasons_at_once_are_named_in_one_order():
    """What the kernel counts for this job itself comes first; other processes last."""
    usually = evidence()
    assert reason(evidence(throttled=0.5, neighbours=1.0), usually, CORES).startswith("cores: the CPU quota")
    assert reason(evidence(neighbours=1.0, cold=0.5), usually, CORES).startswith("storage")
    assert reason(evidence(neighbours=0.4), usually, CORES).startswith("neither")  # a fifth of the cores is little


def test_warm_up_and_the_first_steps_of_epochs_do_not_count():
    meter = WaitMeter(asynchronous=False, warm_up_steps=3)
    for number in range(13):
        edge = number % 5 == 0
        meter.step(5.0 if edge or number < 3 else 0.1, 1.0 + 5.0 * edge, edge)
    assert meter.take() == pytest.approx((8 * 0.1, 8.0))
    assert meter.take() == (0.0, 0.0)


def test_a_validation_pause_does_not_count():
    """`loop_s` counts from the end of a pause on the host; on a device the step after a pause has no gap."""
    host, device = WaitMeter(False, 0), WaitMeter(True, 0)
    for number in range(10):
        host.step(0.01, 0.1, False)
        device.step(0.01, 0.1, False)
        device.device_step(None if number == 5 else 0.005, 0.095)
    assert host.take() == pytest.approx((0.1, 1.0))
    assert device.take() == pytest.approx((9 * 0.005, 9 * 0.1))


def test_on_an_asynchronous_device_only_its_gaps_count():
    """A wait that the queue covers is free; a gap without a wait is the host's; steps measured as one have one gap."""
    meter = WaitMeter(asynchronous=True, warm_up_steps=0)
    for wait_s in (0.5, 0.0, 0.3, 0.2, 0.0):
        meter.step(wait_s, 1.0, False)
    meter.device_step(0.0, 1.0)  # the queue covered half a second
    meter.device_step(0.4, 0.6)  # the host did something else
    meter.device_step(0.2, 0.8)  # idle for part of the wait
    meter.device_step(0.1, 1.9, steps=2)
    assert meter.take() == pytest.approx((0.2 + 0.1, 5.0))
