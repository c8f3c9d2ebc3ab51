"""Several ranks compute what one rank computes: a step, a run, checkpoints. Real processes, connected by gloo."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.changes import changed
from model.parallel.exchange import crossing_numbers, step_bytes
from model.parallel.mesh import Place
from model.parallel.ranks import SINGLE_RANK, Ranks
from model.recipe import SOURCE2012
from model.shapes import TOWERS, NetSpec, tower_slice
from tests.support.rank_jobs import (
    BATCH,
    CROSSING,
    GENTLE,
    SEED,
    SLOW_S,
    SMALL,
    Job,
    as_data_pair,
    as_four,
    as_pair,
    first_step,
    global_batch,
    in_double,
    make,
    on_gpu,
    run,
    run_ranks,
)
from tests.support.shard_fixtures import sample, write_set

RELATIVE = 1e-5
KINDS = ("pair", "four", "data pair")


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 1e-5 of the tensor's own scale."""
    return bool((found - expected).abs().max() <= RELATIVE * expected.abs().max())


@dataclass(frozen=True)
class Results:
    """What the ranks of each kind returned.

    Attributes:
        ranks: for each kind, a record for every rank.
        by_two: the checkpoint at which two ranks stopped.
        again_by_four: the same, read and written again by four ranks.
    """

    ranks: dict[str, list[dict[str, Any]]]
    by_two: Path
    again_by_four: Path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two ranks stop their run after 7 of 20 steps; four ranks resume it."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "shards").mkdir()
    shards = write_set(root / "shards", [sample(number) for number in range(20)]).folder
    args = (root / "two", shards)
    pair, data = run_ranks(root / "pair", 2, Job(as_pair, args), Job(as_data_pair, args, "data"))
    (at_seven,) = [path for path in checkpoint.all_in(root / "two") if path.name.endswith("7")]
    again = root / "again" / at_seven.name
    shutil.copytree(root / "two", root / "four")
    (four,) = run_ranks(root / "as four", 4, Job(as_four, (root / "four", again)))
    return Results({"pair": pair, "four": four, "data pair": data}, at_seven, again)


@pytest.fixture(params=KINDS)
def steps(request: pytest.FixtureRequest, results: Results) -> list[dict[str, Any]]:
    """The first step of a small network, on each rank of a kind."""
    return [rank["small"] for rank in results.ranks[request.param]]


def test_images_after_the_swap_are_those_of_one_rank(steps: list[dict[str, Any]]):
    """Bit for bit and in order: both ranks of a pair have the pair's rows, and all pairs together have the batch."""
    whole = global_batch(0, 0)
    for name in ("images", "labels"):
        for towers in {step["place"].towers for step in steps}:
            rows = [step[name] for step in steps if step["place"].towers == towers]
            assert torch.equal(torch.cat(rows), getattr(whole, name))


def test_a_generator_that_is_closed_early_leaves_no_swap_pending(results: Results):
    assert all(rank["closed early"] for rank in results.ranks["pair"])


def same_step(steps: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Checks that logits, loss and gradients are those of `one`; one rank of a pair holds each gradient."""
    with_loss = [step for step in steps if step["logits"] is not None]
    assert close(torch.cat([step["logits"] for step in with_loss]), one["logits"])
    assert sum(step["loss"] for step in with_loss) / len(with_loss) == pytest.approx(one["loss"], rel=RELATIVE)
    for name, whole in one["gradients"].items():
        for step in steps:
            towers = step["place"].towers
            expected = whole if towers == TOWERS else tower_slice(name, whole, *towers)
            assert close(step["gradients"][name], expected) if len(expected) else name not in step["gradients"], name


def test_a_step_on_several_ranks_is_the_step_on_one(steps: list[dict[str, Any]]):
    same_step(steps, first_step(SINGLE_RANK))


def test_no_parameter_is_held_twice_within_a_pair(steps: list[dict[str, Any]]):
    """The parameters of both ranks together are as many as the network has."""
    place = steps[0]["place"]
    whole = sum(parameter.numel() for parameter in make(SINGLE_RANK)[0].parameters())
    held = sum(g.numel() for step in steps[: place.tower_ranks] for g in step["gradients"].values())
    assert held == whole


def test_counted_bytes_equal_the_calculation(steps: list[dict[str, Any]]):
    for step in steps:
        assert step["sent"] == step["calculated"]
        assert sum(step["sent"].values()) > 0


def test_the_calculated_bytes_are_those_of_the_2012_network():
    """For one image 21,632 activations of pool2, 4,608 of pool5, 2,048 of fc6, and 2,048 of fc7 to tower 0 only."""
    assert crossing_numbers(NetSpec()) == (21_632 + 4_608 + 2_048, 21_632 + 4_608 + 2_048 + 2_048)
    sent = [step_bytes(Place(rank, 2, 2), NetSpec(), SOURCE2012, 128) for rank in (0, 1)]
    assert [round(s["maps"] / 1e6, 1) for s in sent] == [14.5, 15.5]
    assert [s["gradients"] for s in sent] == [s["maps"] for s in reversed(sent)]
    assert sent[0]["images"] == 64 * (3 * 224 * 224 * 4 + 8)
    assert step_bytes(Place(1, 2, 1), NetSpec(), SOURCE2012, 128) == {"sums": 4 * 60_965_224}
    assert [step_bytes(Place(rank, 4, 2), NetSpec(), SOURCE2012, 128)["sums"] for rank in range(4)] == [
        4 * 32_531_112,
        4 * 28_434_112,
    ] * 2


def test_the_full_network_on_a_pair_is_the_one_on_one_rank(results: Results):
    """The same law at width 1 with 1,000 classes."""
    same_step([rank["full"] for rank in results.ranks["pair"]], first_step(SINGLE_RANK, NetSpec(), 2))


@pytest.mark.parametrize("name", CROSSING)
def test_a_changed_network_on_a_pair_is_the_one_on_one_rank(results: Results, name: str):
    """Changes of what crosses between the towers: the same step, and as many bytes as calculated."""
    pair = [rank["changed"][name] for rank in results.ranks["pair"]]
    same_step(pair, first_step(SINGLE_RANK, recipe=changed(SOURCE2012, [name])))
    assert all(step["sent"] == step["calculated"] for step in pair)


def test_one_tower_is_trained_by_several_ranks(results: Results):
    """With the layout "data" each rank holds it whole."""
    steps = [rank["one tower"] for rank in results.ranks["data pair"]]
    same_step(steps, first_step(SINGLE_RANK, recipe=changed(SOURCE2012, ["one-tower"])))
    assert all(step["sent"] == step["calculated"] for step in steps)


@pytest.mark.parametrize("kind", ["pair", "data pair"])
def test_weights_with_the_channels_last_give_the_same_step(kind: str, results: Results):
    """As tensor cores need them: whatever crosses between the ranks has one order. Gradients have that of weights."""
    steps = [rank["channels last"] for rank in results.ranks[kind]]
    same_step(steps, first_step(SINGLE_RANK))
    for step in steps:
        for layer in ("conv1", "conv2", "conv3", "conv4", "conv5"):
            assert step["gradients"][f"{layer}.weight"].is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_crosses_as_bfloat16(results: Results):
    """Counted and calculated bytes are half; a step differs from that of one rank only by rounding."""
    pair, one = [rank["bfloat16"] for rank in results.ranks["pair"]], first_step(SINGLE_RANK, precision="bfloat16")
    for step in pair:
        assert step["sent"] == step["calculated"]
    assert pair[0]["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert pair[0]["sent"]["maps"] == BATCH * crossing_numbers(SMALL)[0] * 2


def test_places_are_those_of_the_mesh():
    """Ranks of a pair have neighbouring numbers, each pair has a part of the batch, and odd numbers raise an error."""
    places = [Place.of(rank, 4) for rank in range(4)]
    assert [(p.data_rank, p.towers, p.partner, p.first_row(8)) for p in places] == [
        (0, (0,), 1, 0),
        (0, (1,), 0, 0),
        (1, (0,), 3, 4),
        (1, (1,), 2, 4),
    ]
    assert Place.of(0, 1).towers == Place.of(2, 3, "data").towers == TOWERS
    with pytest.raises(ValueError, match="3 ranks cannot form tower pairs"):
        Place.of(0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_gpus_is_the_step_on_one(tmp_path: Path):
    """In float64. By NCCL if there are two GPUs, by gloo if two ranks share one."""
    (steps,) = run_ranks(tmp_path, 2, Job(on_gpu), device="cuda")
    assert {step["backend"] for step in steps} == {"nccl" if torch.cuda.device_count() > 1 else "gloo"}
    same_step(steps, on_gpu(Ranks(device=torch.device("cuda"))))
    assert all(step["sent"] == step["calculated"] for step in steps)


# ---- the stall report ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "waits"), [("pair", {"swap", "exchange"}), ("data pair", {"sums"})])
def test_ranks_take_the_same_windows(kind: str, waits: set[str], results: Results):
    """Each takes as many steps, although one rank's loader is far slower; the record says what ranks wait for."""
    first, second = (rank["stall report"] for rank in results.ranks[kind])
    assert first["steps"] == second["steps"] > 0
    record = first["record"]
    assert min(1, record["au"]) == pytest.approx(1 - sum(record["parts"].values()))
    assert record["ranks"]["world"] == len(record["rank_supplies"]) == 2
    assert set(record["rank_waits_s"]) == waits and record["swap_s"] >= 0


def test_a_slow_rank_is_named(results: Results):
    """With real loaders and a planted delay: all ranks get images as slowly as the slow rank, and wait as it does."""
    record = results.ranks["data pair"][0]["stall report"]["record"]
    assert record["cause"]["name"] == "slow rank" and "rank 1" in record["cause"]["because"]
    # A window has only two or three batches, and the first may be partly prefetched before it. So the longest wait
    # counts: the delay without the step, which runs meanwhile and takes up to half of the delay on a busy machine.
    assert record["supply"] <= 1.5 * 2 / SLOW_S
    assert record["waits_s"]["max"] >= SLOW_S / 3


def test_the_cpu_time_of_another_rank_counts_for_the_job(results: Results):
    """Rank 1 uses 0.2 s, which are no noisy neighbour's; clocks may miss a tick or two of it."""
    assert results.ranks["pair"][0]["siblings"] > 0.15


# ---- runs and checkpoints -----------------------------------------------------------------------------------------


def test_steps_at_the_recipe_s_learning_rates_agree(results: Results):
    """Losses with dropout in float64."""
    assert results.ranks["pair"][0]["double"] == pytest.approx(in_double(SINGLE_RANK), rel=1e-10)


def test_20_steps_begun_on_two_ranks_and_resumed_on_others_are_those_of_one_rank(results: Results, tmp_path: Path):
    """Losses with dropout and validation scores agree to 1e-5 in float32, whether 1 or 4 ranks resume."""
    one, two, four = run(SINGLE_RANK, tmp_path), results.ranks["pair"][0]["run"], results.ranks["four"][0]["run"]
    assert (len(one["losses"]), len(two["losses"])) == (20, 7)
    shutil.copytree(results.by_two.parent, tmp_path / "copy")
    for rest in (four, run(SINGLE_RANK, tmp_path / "copy")):
        assert two["losses"] + rest["losses"] == pytest.approx(one["losses"], rel=RELATIVE)
        for scores, expected in zip(two["scores"] + rest["scores"], one["scores"], strict=True):
            assert scores.loss == pytest.approx(expected.loss, rel=RELATIVE)
            assert (scores.top1, scores.images) == (expected.top1, 14)


def test_every_rank_knows_the_losses(results: Results):
    """So all ranks stop together if a loss is not finite."""
    for kind in ("pair", "four"):
        assert len({tuple(rank["run"]["losses"]) for rank in results.ranks[kind]}) == 1


def test_checkpoints_are_the_same_bytes_for_any_number_of_ranks(results: Results, tmp_path: Path):
    """A checkpoint of two ranks, read and written again by four ranks and by one."""
    one = tmp_path / results.by_two.name
    model, optimizer, _ = make(SINGLE_RANK, recipe=GENTLE)
    checkpoint.save(one, model, optimizer, checkpoint.restore(results.by_two, model, optimizer, SEED), SEED)
    for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE):
        expected = (results.by_two / name).read_bytes()
        assert (one / name).read_bytes() == expected
        assert (results.again_by_four / name).read_bytes() == expected
