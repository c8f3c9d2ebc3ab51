"""The stall report of a device that works through a queue, as a GPU does, against that of a synchronous twin.

Loader, host and device are simulated in virtual time. A step takes 17 ms of the device and 4 ms of the host.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.diagnosis.accounting import INPUT_PARTS
from pipeline.diagnosis.findings import Findings, build_findings
from pipeline.diagnosis.html import report_html
from pipeline.diagnosis.predict import REMEDIES, effective_cores
from pipeline.diagnosis.screen import format_findings
from pipeline.profiling.clocks import StepClocks
from pipeline.profiling.stages import StageThroughput
from tests.pipeline.diagnosis.planted_figures import (
    CORES,
    HEALTHY,
    MEMORY,
    QUICK_READ,
    SETUP,
    SLOW_READ,
    stages,
    throughput,
)
from tests.support.simulated_training import SimulatedTraining

STEADY = SimulatedTraining((0.008,))  # a loader that is twice as fast as the trainer
SLOW = SimulatedTraining((0.021,))  # a loader that is slower than the trainer, and hardly uses the CPU
BUSY = replace(SLOW, loader_cores=effective_cores(CORES))  # the same, with all cores in use
TRANSFERRED_SHARE = 0.4  # supply with halves swapped, over that without

# name: (verdict, cause, run, stages, fields of the setup, arguments of `build_findings`)
PLANTED: dict[str, tuple[str, str, SimulatedTraining, StageThroughput, dict[str, Any], dict[str, Any]]] = {
    "none": ("compute-bound", "none", STEADY, HEALTHY, {}, {}),
    "slow trainer": ("compute-bound", "none", replace(STEADY, step_s=0.09), HEALTHY, {}, {}),
    "slow storage": ("input-bound: storage", "slow storage", SLOW, stages(SLOW_READ, reread=1100), {}, {}),
    "cold cache": ("input-bound: storage", "cold cache", SLOW, stages(SLOW_READ, reread=60_000), {}, {}),
    "bursts": (
        "input-bound: storage",
        "bursts",
        SimulatedTraining((0.012,) * 9 + (0.132,)),
        stages(throughput(1000, 0.02, 0.012, 0.132)),
        {},
        {},
    ),
    "few threads": ("input-bound: decode", "few threads", SLOW, stages(QUICK_READ, threads=1), {"threads": 1}, {}),
    "few cores": ("input-bound: decode", "few cores", BUSY, stages(QUICK_READ, 3.0), {}, {}),
    "noisy neighbours": (
        "input-bound: decode",
        "noisy neighbours",
        replace(SLOW, loader_cores=1.5, neighbour_cores=2.5),
        HEALTHY,
        {},
        {},
    ),
    "slow callback": ("unexplained", "slow callback", replace(STEADY, callback_s=0.005), HEALTHY, {}, {}),
    "short queue": (
        "contention",
        "short queue",
        SimulatedTraining((0.004,) * 19 + (0.164,), queue_depth=1),
        HEALTHY,
        {"queue_depth": 1},
        {},
    ),
    "expensive augmentation": (
        "input-bound: augment",
        "expensive augmentation",
        replace(BUSY, batches_s=(0.03,)),
        stages(QUICK_READ, 0.8, 3.0),
        {},
        {},
    ),
    "large images": (
        "input-bound: decode",
        "large images",
        replace(BUSY, batches_s=(0.04,)),
        stages(QUICK_READ, 6.0),
        {"decode_area_ratio": 8.0},
        {},
    ),
    "slow transfer": (
        "input-bound: transfer",
        "slow transfer",
        SLOW,
        HEALTHY,
        {"ranks": 2},
        {"swapped": TRANSFERRED_SHARE * HEALTHY.full.img_s, "rank_supplies": (1950.0, 1960.0)},
    ),
    "slow rank": (
        "input-bound: decode",
        "slow rank",
        replace(SLOW, loader_cores=1.6),
        HEALTHY,
        {"ranks": 2},
        {"rank_supplies": (1900.0, 800.0)},
    ),
}


@cache
def found_for(name: str, asynchronous: bool) -> Findings:
    """The findings of a planted run. The twin of an asynchronous device has as many batches before the device."""
    _, _, run, apart, setup, known = PLANTED[name]
    measured = (run if asynchronous else run.twin()).measure(asynchronous)
    return build_findings(apart, measured, replace(SETUP, **setup), MEMORY, {}, **known)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_stall_is_named(name: str, asynchronous: bool):
    """On both devices, and the first action removes it; the parts are shares from 0 to 1 and add up to the stall."""
    verdict, cause, *_ = PLANTED[name]
    found = found_for(name, asynchronous)
    assert (found.account.verdict, found.cause.name) == (verdict, cause)
    assert [action.change in REMEDIES[cause] for action in found.actions[:1]] == [True] * (cause != "none")
    assert all(0 <= share <= 1 for share in found.account.parts.values())
    assert sum(found.account.parts.values()) == pytest.approx(max(0.0, found.account.stall), abs=1e-9)


@pytest.mark.parametrize("name", PLANTED)
def test_both_devices_give_the_same_report(name: str):
    """AU and parts agree within 1% of the run's time; the same actions are predicted to bring the same within 2%."""
    synchronous, asynchronous = found_for(name, False), found_for(name, True)
    assert asynchronous.account.au == pytest.approx(synchronous.account.au, abs=0.01)
    assert asynchronous.account.parts == pytest.approx(synchronous.account.parts, abs=0.01)
    predicted = [{action.change: action.together for action in one.actions} for one in (synchronous, asynchronous)]
    assert predicted[1] == pytest.approx(predicted[0], rel=0.02)


def test_a_wait_costs_what_exceeds_the_device_s_work():
    """A loader of 21 ms a batch keeps a device of 17 ms a step busy for 81% of the time; the rest is its input."""
    found = found_for("few cores", True)
    assert found.account.au == pytest.approx(17 / 21, abs=0.005)
    assert found.account.verdict == "input-bound: decode"
    assert sum(found.account.parts[part] for part in INPUT_PARTS) == pytest.approx(4 / 21, abs=0.005)
    assert found.account.parts["contention"] == pytest.approx(0, abs=0.005)
    assert found.waits_s["p50"] == pytest.approx(0.017), "the waits of the report are the host's"


def test_the_host_s_clocks_alone_mislead():
    """The same run, reported as if the device were synchronous: most of the wait seems to be contention."""
    misled = BUSY.measure(asynchronous=True, claimed=False)
    _, _, _, apart, *_ = PLANTED["few cores"]
    found = build_findings(apart, misled, SETUP, MEMORY, {})
    assert found.account.verdict == "contention"
    assert found.account.parts["contention"] == pytest.approx(0.15, abs=0.005)


@pytest.mark.parametrize("max_pending", [1, 2, 8, 60])
@pytest.mark.parametrize("launch_s", [0.0005, 0.004, 0.016])
def test_the_length_of_the_queue_does_not_matter_to_a_steady_loader(max_pending: int, launch_s: float):
    measured = replace(BUSY, max_pending=max_pending, launch_s=launch_s).measure(asynchronous=True)
    account = build_findings(PLANTED["few cores"][3], measured, SETUP, MEMORY, {}).account
    assert account.verdict == "input-bound: decode"
    assert sum(account.parts[part] for part in INPUT_PARTS) == pytest.approx(4 / 21, abs=0.005)


def test_a_trainer_that_is_limited_by_launching_waits_as_on_a_cpu():
    """30 ms to launch a step of 17 ms: replayed steps take 30 ms, and a loader of 40 ms a batch costs 10 ms of each."""
    measured = replace(BUSY, batches_s=(0.04,), launch_s=0.03).measure(asynchronous=True)
    account = build_findings(PLANTED["few cores"][3], measured, SETUP, MEMORY, {}).account
    assert account.verdict == "input-bound: decode"
    assert sum(account.parts[part] for part in INPUT_PARTS) == pytest.approx(10 / 40, abs=0.005)


@pytest.mark.parametrize("seed", range(6))
def test_an_uneven_loader_gives_the_twins_the_same_account(seed: int):
    """Batches of random times, fast enough on average or not. The queue of the loader of an asynchronous device has a
    place free one launch later than its twin's, so launches are short here."""
    rng = np.random.default_rng(seed)
    batches_s = tuple(rng.exponential(rng.uniform(0.01, 0.025), 50).tolist())
    depth, pending = rng.integers(1, 4, 2).tolist()
    run = SimulatedTraining(batches_s, launch_s=0.0002, queue_depth=depth, max_pending=pending)
    twins = (run.twin().measure(asynchronous=False), run.measure(asynchronous=True))
    synchronous, asynchronous = (build_findings(HEALTHY, one, SETUP, MEMORY, {}).account for one in twins)
    assert asynchronous.verdict == synchronous.verdict
    assert asynchronous.au == pytest.approx(synchronous.au, abs=0.01)
    assert asynchronous.parts == pytest.approx(synchronous.parts, abs=0.01)


@pytest.mark.parametrize("host_s", [0.001, 0.012])
def test_a_callback_that_the_queue_covers_costs_nothing(host_s: float):
    """The device has 17 ms of work, and the host needs 4 ms to launch more."""
    measured = replace(STEADY, callback_s=host_s, reads_loss=False).measure(asynchronous=True)
    found = build_findings(HEALTHY, measured, SETUP, MEMORY, {})
    assert found.account.verdict == "compute-bound"
    assert found.account.au == pytest.approx(1, abs=0.005)


def test_a_callback_that_outlasts_the_queue_costs_the_difference():
    """22 ms for a callback and a launch of 4 ms are 26 ms for a step of 17 ms."""
    measured = replace(STEADY, callback_s=0.022, reads_loss=False).measure(asynchronous=True)
    found = build_findings(HEALTHY, measured, SETUP, MEMORY, {})
    assert (found.account.verdict, found.cause.name) == ("unexplained", "slow callback")
    assert found.account.parts["unexplained"] == pytest.approx(9 / 26, abs=0.005)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_steps_that_are_slower_beside_the_loader_are_contention(asynchronous: bool):
    """17 ms on replayed batches, 20 ms beside the loader: 3 of 20 ms."""
    measured = replace(STEADY, beside_loader_s=0.003).measure(asynchronous)
    found = build_findings(HEALTHY, measured, SETUP, MEMORY, {})
    assert found.account.verdict == "contention"
    assert found.account.parts["contention"] == pytest.approx(3 / 20, abs=0.005)
    if asynchronous:
        assert found.cause.name == "shared device" and "18% longer" in found.cause.because


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_steps_that_are_faster_than_replayed_ones_leave_the_parts_in_order(asynchronous: bool):
    """AU is then above 1, or the parts are smaller than the waits: still none is negative, and they add up."""
    for batch_s in (0.008, 0.021):
        run = SimulatedTraining((batch_s,), beside_loader_s=-0.003)
        account = build_findings(HEALTHY, run.measure(asynchronous), SETUP, MEMORY, {}).account
        assert all(0 <= share <= 1 for share in account.parts.values())
        assert sum(account.parts.values()) == pytest.approx(max(0.0, account.stall), abs=1e-9)


def test_the_launching_thread_shares_no_cores_if_there_are_enough():
    """It uses a core all the time. With cores to spare, uneven waits come from the queue; without, from the thread."""
    _, _, run, apart, setup, _ = PLANTED["short queue"]
    measured = replace(run, trainer_cores=1.0).measure(asynchronous=True)
    for cores, cause in ((64, "short queue"), (1, "shared cores")):
        found = build_findings(apart, measured, replace(SETUP, **setup, cores=cores), MEMORY, {})
        assert (found.account.verdict, found.cause.name) == ("contention", cause)
        assert bool(found.workload.uneven_wait_s) == (cause == "short queue")


def test_what_is_predicted_without_the_callback_is_what_the_device_then_does():
    action = found_for("slow callback", True).actions[0]
    after = STEADY.measure(asynchronous=True).clocks
    assert action.change == "callback"
    assert action.together == pytest.approx(after.images / after.elapsed_s, rel=0.01)


def test_the_report_says_what_it_rests_on():
    """In the record and on the screen: whether the device is asynchronous, and which clocks are the evidence."""
    for asynchronous, word in ((False, "the device is synchronous"), (True, "the device is asynchronous")):
        found = found_for("few cores", asynchronous)
        assert found.record()["device"]["asynchronous"] is asynchronous
        assert word in format_findings(found)
        assert ("waits      host: p50" in format_findings(found)) == asynchronous
        assert ("queued steps may cover waits" in report_html(found, "a run")) == asynchronous
        assert max(map(len, format_findings(found).splitlines())) <= 120


def test_the_document_has_the_figures_of_these_tests():
    text = (Path(__file__).parents[3] / "docs" / "stall-report.md").read_text()
    for name in PLANTED:
        synchronous, asynchronous = (found_for(name, device).account.au for device in (False, True))
        verdict, cause, *_ = PLANTED[name]
        assert f"| {name} | {verdict} | {cause} | {synchronous:.1%} | {asynchronous:.1%} |" in text


@pytest.mark.parametrize("events", [False, True])
def test_a_run_on_an_asynchronous_device_is_judged_by_events_or_not_at_all(events: bool):
    """The host waited 20 ms for each batch. The device was idle for 5 ms, or for 21, of which the host explains 1."""
    clocks = StepClocks()
    for number in range(101):
        clocks.add(128, 0.02, 0.004, 0.024)
        if events:
            clocks.add_device((0.005 if number % 2 else 0.021) if number else None, 0.017)
    found = build_findings(HEALTHY, STEADY.measure(asynchronous=True), SETUP, MEMORY, {}, clocks=clocks)
    record, screen = found.record(), format_findings(found)
    assert record["device"]["run"] == ("CUDA events" if events else None)
    assert ("the run: CUDA events" in screen) == events
    if events:
        input_s = 50 * 0.005 + 50 * 0.02
        assert record["run"]["idle_shares"] == pytest.approx({"input": input_s / 2.4, "host": 0.05 / 2.4})
        assert f"idle {input_s / 2.4:.1%} for input" in screen
    else:
        assert record["run"]["idle_shares"] is None
    assert max(map(len, screen.splitlines())) <= 120
