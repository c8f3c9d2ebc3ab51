"""The model behind the predictions: its laws, and workloads whose answer can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from pipeline.diagnosis.causes import Cause
from pipeline.diagnosis.predict import (
    LEADING_GAIN_SHARE,
    REMEDIES,
    Action,
    Change,
    advice,
    effective_cores,
    model_together,
    predicted_supply,
    predicted_together,
    ranked_actions,
    resource_limits,
)
from pipeline.diagnosis.workload import Workload

NO_CAUSE = Cause("none", "")
FAST = Workload(
    threads=4,
    cores=4,
    neighbour_cores=0,
    storage_s=0.0,
    read_cpu_s=0.00002,
    decode_cpu_s=0.0004,
    augment_cpu_s=0.00008,
    trainer_cpu_s=0,
    demand=20000,
    supply=7200,  # of 8,000 by the model
    together=7000,
)


def random_workload(seed: int) -> Workload:
    """Any workload at all."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(1e-5, 1e-3, 5).tolist()
    return Workload(int(rng.integers(1, 9)), 8.0, rng.uniform(0, 4), *seconds, *rng.uniform(500, 5000, 3).tolist())


def test_half_the_threads_give_half_of_what_was_measured():
    """Supply is proportional to min(threads, effective cores): 3,600 img/s from 2 threads on 4 cores are 1,800 from 1,
    and 8 threads give no more than 4."""
    two = replace(FAST, threads=2, supply=3600)
    assert predicted_supply(two, replace(two, threads=1)) == pytest.approx(1800)
    assert predicted_supply(two, FAST) == pytest.approx(1800 * effective_cores(4))
    assert predicted_supply(FAST, replace(FAST, threads=8)) == pytest.approx(7200)


@pytest.mark.parametrize("seed", range(20))
def test_no_change_predicts_no_change(seed: int):
    load = random_workload(seed)
    assert predicted_supply(load, load) == pytest.approx(load.supply)
    assert predicted_together(load, load) == pytest.approx(min(load.together, load.supply, load.demand))


@pytest.mark.parametrize("seed", range(20))
def test_an_improvement_never_lowers_a_prediction(seed: int):
    """More threads or cores, cheaper work, faster storage, fewer neighbours: the model never gives less."""
    load = random_workload(seed)
    for better in (
        {"threads": load.threads + 1},
        {"cores": load.cores + 1},
        {"decode_cpu_s": load.decode_cpu_s / 2},
        {"storage_s": load.storage_s / 2},
        {"neighbour_cores": 0.0},
        {"demand": load.demand * 2},
    ):
        assert model_together(replace(load, **better)) >= model_together(load)


@pytest.mark.parametrize("cause", REMEDIES)
@pytest.mark.parametrize("seed", range(20))
def test_actions_are_ranked_and_worth_it(seed: int, cause: str):
    """First what removes the cause, then settings, if they bring a quarter of the best gain; then by throughput."""
    load = replace(random_workload(seed), together=100.0, decode_area_ratio=1.4)
    found = ranked_actions(load, Cause(cause, ""))
    assert all(action.together > load.together for action in found)
    assert {action.change for action in found} <= set(get_args(Change))
    best_gain = max((action.together for action in found), default=100.0) - 100

    def place(action: Action) -> int:
        leads = action.together - 100 >= LEADING_GAIN_SHARE * best_gain
        return 0 if leads and action.change in REMEDIES[cause] else 1 if leads and action.settings else 2

    assert [place(action) for action in found] == sorted(place(action) for action in found)
    for number in range(3):
        of_place = [action.together for action in found if place(action) == number]
        assert of_place == sorted(of_place, reverse=True)


def test_too_few_threads_lead_to_more_threads():
    load = replace(FAST, threads=1, supply=1900, together=1850)
    first = ranked_actions(load, NO_CAUSE)[0]
    assert (first.settings, round(first.supply)) == ({"threads": 5}, round(1900 * effective_cores(4)))
    assert str(first).startswith("--threads 5: predicted 6,7")


def test_a_demanding_gpu_requires_cores():
    """20,000 img/s at 0.5 ms each are 10 cores, 6 more than there are."""
    assert ranked_actions(FAST, NO_CAUSE)[0].text == "6 more cores, --threads 10"


def test_the_next_bottleneck_is_the_next_limit():
    """Storage allows 5,000 img/s, the loader's CPU time 7,520, the trainer 20,000: in that order."""
    assert list(resource_limits(replace(FAST, storage_s=0.0002))) == ["storage", "loader", "trainer"]


def test_work_on_shared_cores_adds_up():
    """Two cores, 1.2 ms of training and 0.5 ms of loading are 1,176 img/s, although the loader alone gives 4,000."""
    load = replace(FAST, cores=2, trainer_cpu_s=0.0012, demand=1666)
    assert model_together(load) == pytest.approx(2 / 0.0017)
    assert next(iter(resource_limits(load))) == "shared cores"


def test_a_short_queue_and_a_callback_cost_what_they_take():
    """Steps take 1 ms an image; uneven waits of 0.25 ms and as much between steps are a third of the time. A queue
    twice as deep halves the uneven waits."""
    load = replace(FAST, demand=1000, together=600, uneven_wait_s=0.00025, between_s=0.00025)
    found = {action.change: action for action in ranked_actions(load, NO_CAUSE)}
    assert found["queue"].settings == {"queue_depth": 4}
    assert found["queue"].together == pytest.approx(600 * 1.5 / 1.375)
    assert found["callback"].together == pytest.approx(600 * 1.5 / 1.25)


def test_one_core_is_used_all_the_time():
    """Threads on several cores wait for one another at the end of a batch; no core is lost altogether."""
    assert effective_cores(1) == 1 and effective_cores(0.5) == 0.5
    assert all(
        effective_cores(cores) < cores and effective_cores(cores) < effective_cores(cores + 1) for cores in range(2, 99)
    )


def test_a_square_set_costs_what_a_square_costs():
    """Of 1.25 + 1.375 units of decoding 1.25 + 1 remain, 6/7, as measured on photographs."""
    load = replace(FAST, decode_area_ratio=1.375)
    square = next(action for action in ranked_actions(load, NO_CAUSE) if action.change == "square")
    cost = FAST.read_cpu_s + FAST.augment_cpu_s + FAST.decode_cpu_s * 6 / 7
    assert square.supply == pytest.approx(FAST.supply * FAST.loader_cpu_s / cost)


def test_a_free_swap_leaves_the_cost_of_the_loader():
    """Swapping halves adds 0.1 ms an image to the loader; the model knows 0.133 ms of it without the swap."""
    load = replace(FAST, transfer_s=0.0001, supply=1 / (1 / 7200 + 0.0001), together=4000, ranks=2, threads=8)
    transfer = next(action for action in ranked_actions(load, NO_CAUSE) if action.change == "transfer")
    model_s = FAST.loader_cpu_s / (2 * effective_cores(2))
    assert transfer.supply == pytest.approx(load.supply * (model_s + 0.0001) / model_s)


@pytest.mark.parametrize("storage_s", [0.0, 0.001])
def test_repairing_the_slow_rank_gives_the_throughput_of_the_others(storage_s: float):
    """One of two ranks is half as fast, by its CPU or by its disk: supply doubles."""
    load = replace(FAST, ranks=2, rank_supplies=(900.0, 450.0), supply=900, together=890, storage_s=storage_s)
    repaired = next(action for action in ranked_actions(load, NO_CAUSE) if action.change == "slow rank")
    assert repaired.supply == pytest.approx(1800)
    assert "rank 1" in repaired.text


def test_a_first_action_that_does_not_remove_the_cause_is_called_so():
    """Neighbours that use few cores are not what limits this run, which has a slow callback."""
    load, cause = replace(FAST, demand=1000, together=800, between_s=0.00025), Cause("noisy neighbours", "")
    found = ranked_actions(load, cause)
    assert [action.change for action in found] == ["callback"]
    assert advice(load, cause, found) == (
        "noisy neighbours, but another change gains most: take what runs between steps out of the loop,"
        " predicted 1,000 img/s (+25%)"
    )


def test_a_loader_that_outruns_the_trainer_needs_no_change():
    assert ranked_actions(replace(FAST, demand=1000, together=995), NO_CAUSE) == []
