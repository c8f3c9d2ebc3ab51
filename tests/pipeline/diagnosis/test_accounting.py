"""Stall accounting: planted times come back as the parts that they were, and the parts always add up."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.diagnosis.accounting import AU_THRESHOLD, PARTS, LoaderThroughput, account_stall, format_account
from pipeline.profiling.clocks import LoopTotals, StepClocks, percentiles


def timed(read_ms: float, decode_ms: float, augment_ms: float, transfer_ms: float = 0.0) -> LoaderThroughput:
    """A loader whose stages take these milliseconds per image, one after another."""
    ends = np.cumsum([read_ms, decode_ms, augment_ms, transfer_ms])
    return LoaderThroughput(*(1000 / ends).tolist())


def clocks(wait_ms: float, step_ms: float, rest_ms: float = 0.0) -> LoopTotals:
    """LoopTotals of 1000 images that took these milliseconds each."""
    return LoopTotals(1000, wait_ms, step_ms, wait_ms + step_ms + rest_ms)


PLANTED = {
    # name: (loader, trainer's ms, clocks, verdict, parts that are not 0)
    "none": (timed(0.01, 0.4, 0.2), 2.0, clocks(0.02, 2.0), "compute-bound", {"contention": 0.02 / 2.02}),
    "slow decode": (timed(0.1, 2.5, 0.4), 1.0, clocks(2.0, 1.0), "input-bound: decode", {"decode": 2 / 3 * 2.5 / 3}),
    "slow disk": (timed(5.0, 0.5, 0.5), 1.0, clocks(5.0, 1.0), "input-bound: storage", {"storage": 5 / 6 * 5 / 6}),
    "slow augment": (timed(0.1, 0.4, 3.5), 1.0, clocks(3.0, 1.0), "input-bound: augment", {"augment": 3 / 4 * 3.5 / 4}),
    "slow bus": (timed(0.1, 0.4, 0.5, 3.0), 1.0, clocks(3.0, 1.0), "input-bound: transfer", {"transfer": 9 / 16}),
    "shared cores": (timed(0.01, 0.4, 0.2), 2.0, clocks(0.1, 2.9), "contention", {"contention": 1.0 / 3.0}),
    "slow logging": (timed(0.01, 0.4, 0.2), 2.0, clocks(0.0, 2.0, 0.05), "compute-bound", {"unexplained": 0.05 / 2.05}),
    "slow callback": (timed(0.01, 0.4, 0.2), 2.0, clocks(0.0, 2.0, 0.5), "unexplained", {"unexplained": 0.2}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_stall_is_named_and_sized(name: str):
    loader, demand_ms, times, verdict, expected = PLANTED[name]
    account = account_stall(loader, 1000 / demand_ms, times)
    assert account.verdict == verdict
    for part, share in expected.items():
        assert account.parts[part] == pytest.approx(share, abs=1e-9)
    largest = max(account.parts, key=lambda part: account.parts[part])
    assert largest in expected


@pytest.mark.parametrize("seed", range(20))
def test_parts_add_up_to_the_stall(seed: int):
    """For any measurement, even of a run that is faster than its replay: no part is negative or above the whole, and AU
    is 1 minus their sum, or above 1 without parts."""
    rng = np.random.default_rng(seed)
    loader = timed(*rng.uniform(0.01, 3, 4))
    account = account_stall(loader, rng.uniform(100, 2000), clocks(*rng.uniform(0, 3, 3)))
    assert set(account.parts) == set(PARTS)
    assert sum(account.parts.values()) == pytest.approx(max(0.0, account.stall))
    assert all(0 <= share <= 1 for share in account.parts.values())
    assert account.au == pytest.approx(1 - account.stall)
    assert account.au == pytest.approx(account.together / account.demand)
    assert account.overlap == pytest.approx(account.together / min(account.supply, account.demand))


def test_a_faster_loader_never_makes_the_stall_larger():
    shares = []
    for decode_ms in (4.0, 3.0, 2.0, 1.0):
        loader = timed(0.1, decode_ms, 0.4)
        wait_ms = max(0.0, decode_ms + 0.5 - 1.0)
        shares.append(account_stall(loader, 1000.0, clocks(wait_ms, 1.0)).stall)
    assert shares == sorted(shares, reverse=True)


def test_the_verdict_changes_at_the_threshold():
    loader = timed(0.1, 0.55, 0.4)
    wait_ms = 1 / AU_THRESHOLD - 1
    assert account_stall(loader, 1000, clocks(wait_ms * 0.99, 1.0)).verdict == "compute-bound"
    assert account_stall(loader, 1000, clocks(wait_ms * 1.01, 1.0)).verdict == "input-bound: decode"


def test_the_first_step_does_not_count():
    """It waits for the first batch and includes warm-up."""
    times = StepClocks()
    times.add(8, 30.0, 9.0, 40.0, edge=True)
    for edge in (False, True, False):
        times.add(8, 0.5, 1.0, 1.6, edge)
    assert times.steps == 3
    assert (times.first_wait_s, times.edge_waits_s) == (30.0, [0.5])
    assert times.total() == LoopTotals(24, 1.5, 3.0, pytest.approx(4.8))


def test_device_steps_count_with_the_gap_before_them():
    times = StepClocks()
    for gap_s, step_s in ((None, 9.0), (0.25, 1.0), (0.5, 2.0), (None, 3.0)):
        times.add_device(gap_s, step_s)
    assert (times.device_gaps_s, times.device_steps_s) == ([0.25, 0.5], [1.0, 2.0])


def test_percentiles_are_in_order():
    found = percentiles(list(np.random.default_rng(0).exponential(size=500)))
    assert list(found) == ["p50", "p95", "p99", "max"]
    assert list(found.values()) == sorted(found.values())


def test_the_text_shows_every_figure_and_part():
    loader, demand_ms, times, *_ = PLANTED["slow decode"]
    text = format_account(account_stall(loader, 1000 / demand_ms, times))
    for word in (*PARTS, "supply", "demand", "together", "AU ", "accelerator utilisation", "overlap"):
        assert word in text


def test_a_scaled_loader_keeps_its_shares_of_time():
    loader = timed(0.1, 2.5, 0.4, 0.2)
    scaled = loader.scaled_to(loader.supply / 3)
    assert scaled.supply == pytest.approx(loader.supply / 3)
    for part, seconds in loader.part_s().items():
        assert scaled.part_s()[part] == pytest.approx(3 * seconds)
