"""The model behind the predictions: its laws, and loads whose answer can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from pipeline.diagnosis.predict import (
    Change,
    Load,
    actions,
    busy,
    limits,
    model_together,
    predicted_supply,
    predicted_together,
)

FAST = Load(
    threads=4,
    cores=4,
    neighbours=0,
    storage_s=0.0,
    read_s=0.00002,
    decode_s=0.0004,
    augment_s=0.00008,
    trainer_s=0,
    demand=20000,
    supply=7200,  # of 8,000 by the model
    together=7000,
)


def drawn(seed: int) -> Load:
    """Any load at all."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(1e-5, 1e-3, 5).tolist()
    return Load(int(rng.integers(1, 9)), 8.0, rng.uniform(0, 4), *seconds, *rng.uniform(500, 5000, 3).tolist())


def test_half_the_threads_give_half_of_what_was_measured():
    """supply(threads) goes with min(threads, cores kept busy): 3,600 from 2 of 4 cores is 1,800 from 1, and from 8
    threads it is no more than from 4."""
    two = replace(FAST, threads=2, supply=3600)
    assert predicted_supply(two, replace(two, threads=1)) == pytest.approx(1800)
    assert predicted_supply(two, FAST) == pytest.approx(1800 * busy(4))
    assert predicted_supply(FAST, replace(FAST, threads=8)) == pytest.approx(7200)


@pytest.mark.parametrize("seed", range(20))
def test_no_change_predicts_no_change(seed: int):
    load = drawn(seed)
    assert predicted_supply(load, load) == pytest.approx(load.supply)
    assert predicted_together(load, load) == pytest.approx(min(load.together, load.supply, load.demand))


@pytest.mark.parametrize("seed", range(20))
def test_help_never_hurts(seed: int):
    """More threads, more cores, cheaper work or faster storage: the model never gives less."""
    load = drawn(seed)
    for better in (
        {"threads": load.threads + 1},
        {"cores": load.cores + 1},
        {"decode_s": load.decode_s / 2},
        {"storage_s": load.storage_s / 2},
        {"neighbours": 0.0},
        {"demand": load.demand * 2},
    ):
        assert model_together(replace(load, **better)) >= model_together(load)


@pytest.mark.parametrize("seed", range(20))
def test_actions_are_ranked_and_worth_it(seed: int):
    load = replace(drawn(seed), together=100.0, area=1.4)
    found = actions(load)
    assert all(action.together > load.together for action in found)
    assert {action.change for action in found} <= set(get_args(Change))
    best = max((action.together for action in found), default=100.0)
    free = [action for action in found if action.settings and action.together - 100 >= (best - 100) / 4]
    assert found[: len(free)] == sorted(free, key=lambda action: -action.together)
    rest = found[len(free) :]
    assert rest == sorted(rest, key=lambda action: -action.together)


def test_a_feed_with_too_few_threads_is_told_so():
    load = replace(FAST, threads=1, supply=1900, together=1850)
    first = actions(load)[0]
    assert (first.settings, round(first.supply)) == ({"threads": 5}, round(1900 * busy(4)))
    assert str(first).startswith("--threads 5: predicted 6,7")


def test_a_starving_gpu_wants_cores():
    """20,000 img/s at 0.5 ms are 10 cores; 6 more than there are."""
    assert actions(FAST)[0].text == "6 more cores, --threads 10"


def test_the_next_bottleneck_is_the_next_limit():
    """Storage allows 5,000, the feed's CPU 7,520, the trainer 20,000: in that order."""
    assert list(limits(replace(FAST, storage_s=0.0002))) == ["storage", "feed", "trainer"]


def test_work_on_shared_cores_adds_up():
    """Two cores, 1.2 ms of training and 0.5 ms of feeding: 1,176 img/s, the feed being able to give 4,000."""
    load = replace(FAST, cores=2, trainer_s=0.0012, demand=1666)
    assert model_together(load) == pytest.approx(2 / 0.0017)
    assert next(iter(limits(load))) == "shared cores"


def test_a_short_queue_and_a_callback_cost_what_they_take():
    """Steps of 1 ms an image: 0.25 ms waited without need and as much between steps are a third of the time. A queue
    twice as deep halves the former."""
    load = replace(FAST, demand=1000, together=600, uneven_s=0.00025, between_s=0.00025)
    found = {action.change: action for action in actions(load)}
    assert found["queue"].settings == {"queue_depth": 4}
    assert found["queue"].together == pytest.approx(600 * 1.5 / 1.375)
    assert found["callback"].together == pytest.approx(600 * 1.5 / 1.25)


def test_one_core_is_busy_all_the_time():
    """More cores wait for one another at the end of a batch; none is lost altogether."""
    assert busy(1) == 1 and busy(0.5) == 0.5
    assert all(busy(cores) < cores and busy(cores) < busy(cores + 1) for cores in range(2, 99))


def test_a_square_set_is_decoded_at_what_a_square_costs():
    """Of 1.25 + 1.375 units 1.25 + 1 are left: 6/7 of the decoding, as measured on photographs."""
    load = replace(FAST, area=1.375)
    square = next(action for action in actions(load) if action.change == "square")
    cost = FAST.read_s + FAST.augment_s + FAST.decode_s * 6 / 7
    assert square.supply == pytest.approx(FAST.supply * FAST.feed_s / cost)


def test_a_fast_trainer_s_run_has_nothing_to_gain():
    """A trainer that the feed outruns: no change of the feed is proposed."""
    assert actions(replace(FAST, demand=1000, together=995)) == []
