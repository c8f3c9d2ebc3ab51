"""Towers on several ranks are the towers on one: numbers, bytes, checkpoints, resuming. Real processes, on gloo."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.parallel.exchange import crossing_numbers, step_bytes
from model.parallel.mesh import Place
from model.parallel.ranks import SINGLE_RANK, Ranks
from model.recipe import SOURCE2012
from model.shapes import TOWERS, NetSpec, tower_slice
from tests.support.rank_jobs import (
    BATCH,
    GENTLE,
    SEED,
    SLOW_S,
    SMALL,
    Act,
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
class Answers:
    """What the ranks of each kind answered, and where one rank, and two, left their checkpoints."""

    ranks: dict[str, list[dict[str, Any]]]
    by_two: Path
    again_by_four: Path


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Two ranks stop their run after 7 of 20 steps; four go on with it."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "shards").mkdir()
    shards = write_set(root / "shards", [sample(number) for number in range(20)]).folder
    told = (root / "two", shards)
    pair, data = run_ranks(root / "pair", 2, Act(as_pair, told), Act(as_data_pair, told, "data"))
    (at_seven,) = [path for path in checkpoint.all_in(root / "two") if path.name.endswith("7")]
    again = root / "again" / at_seven.name
    shutil.copytree(root / "two", root / "four")
    (four,) = run_ranks(root / "as four", 4, Act(as_four, (root / "four", again)))
    return Answers({"pair": pair, "four": four, "data pair": data}, at_seven, again)


@pytest.fixture(params=KINDS)
def steps(request: pytest.FixtureRequest, answers: Answers) -> list[dict[str, Any]]:
    """The first step of a small network on each rank."""
    return [answer["small"] for answer in answers.ranks[request.param]]


def test_images_after_the_swap_are_one_rank_s(steps: list[dict[str, Any]]):
    """Bit for bit, in its order: both ranks of a pair have its rows, and the pairs' one after another are the batch."""
    whole = global_batch(0, 0)
    for name in ("images", "labels"):
        for towers in {step["place"].towers for step in steps}:
            rows = [step[name] for step in steps if step["place"].towers == towers]
            assert torch.equal(torch.cat(rows), getattr(whole, name))


def test_a_stream_that_is_closed_early_leaves_nothing_under_way(answers: Answers):
    assert all(answer["left early"] for answer in answers.ranks["pair"])


def same_step(steps: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Logits, loss and every parameter's gradient, each held by exactly one rank of a pair, are those of `one`."""
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
    """Both ranks' parameters together are the network's."""
    place = steps[0]["place"]
    whole = sum(parameter.numel() for parameter in make(SINGLE_RANK)[0].parameters())
    held = sum(g.numel() for step in steps[: place.tower_ranks] for g in step["gradients"].values())
    assert held == whole


def test_counted_bytes_are_the_calculated(steps: list[dict[str, Any]]):
    for step in steps:
        assert step["sent"] == step["calculated"]
        assert sum(step["sent"].values()) > 0


def test_the_calculation_is_that_of_2012():
    """Numbers for one image: 21,632 after pool2, 4,608 after pool5, 2,048 of fc6, and of fc7 to tower 0 alone."""
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


def test_the_full_network_on_a_pair_is_the_one_on_one_rank(answers: Answers):
    """At width 1 with 1,000 classes."""
    same_step([answer["full"] for answer in answers.ranks["pair"]], first_step(SINGLE_RANK, NetSpec(), 2))


def test_bfloat16_crosses_as_bfloat16(answers: Answers):
    """Half the bytes, counted and calculated; a step differs from one rank's by rounding."""
    pair, one = [answer["bfloat16"] for answer in answers.ranks["pair"]], first_step(SINGLE_RANK, precision="bfloat16")
    for step in pair:
        assert step["sent"] == step["calculated"]
    assert pair[0]["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert pair[0]["sent"]["maps"] == BATCH * crossing_numbers(SMALL)[0] * 2


def test_places_are_those_of_the_mesh():
    """Ranks of a pair stand next to each other; parts of the batch go by pair; odd numbers are no pairs."""
    places = [Place.of(rank, 4) for rank in range(4)]
    assert [(p.data_rank, p.towers, p.peer, p.first_row(8)) for p in places] == [
        (0, (0,), 1, 0),
        (0, (1,), 0, 0),
        (1, (0,), 3, 4),
        (1, (1,), 2, 4),
    ]
    assert Place.of(0, 1).towers == Place.of(2, 3, "data").towers == TOWERS
    with pytest.raises(ValueError, match="3 ranks are no pairs of towers"):
        Place.of(0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_gpus_is_the_step_on_one(tmp_path: Path):
    """By NCCL where there are two GPUs, by gloo where two ranks share one."""
    (steps,) = run_ranks(tmp_path, 2, Act(on_gpu), device="cuda")
    assert {step["backend"] for step in steps} == {"nccl" if torch.cuda.device_count() > 1 else "gloo"}
    same_step(steps, on_gpu(Ranks(device=torch.device("cuda"))))
    assert all(step["sent"] == step["calculated"] for step in steps)


# ---- the stall report ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "waits"), [("pair", {"swap", "exchange"}), ("data pair", {"sums"})])
def test_ranks_take_the_same_windows(kind: str, waits: set[str], answers: Answers):
    """As many steps on each, though of the data pair one is fed far slower; the record has what ranks wait for."""
    first, second = (answer["stall report"] for answer in answers.ranks[kind])
    assert first["steps"] == second["steps"] > 0
    record = first["record"]
    assert record["au"] == pytest.approx(1 - sum(record["parts"].values()))
    assert record["ranks"]["world"] == len(record["rank_supplies"]) == 2
    assert set(record["rank_waits_s"]) == waits and record["swap_s"] >= 0


def test_a_slow_rank_is_named(answers: Answers):
    """A planted one, by real feeds: all of them together are fed what it is fed, for each, and wait as it does."""
    record = answers.ranks["data pair"][0]["stall report"]["record"]
    assert record["cause"]["name"] == "slow rank" and "rank 1 is fed" in record["cause"]["because"]
    # windows are a batch or two long here, and part of one may be made between them
    assert record["supply"] <= 1.5 * 2 / SLOW_S and record["waits_s"]["p50"] >= SLOW_S / 1.5


def test_the_cpu_time_of_another_rank_is_the_job_s(answers: Answers):
    """Not a neighbour's: rank 1 burns 0.2 s, of which clocks may miss a tick or two."""
    assert answers.ranks["pair"][0]["siblings"] > 0.15


# ---- runs and checkpoints -----------------------------------------------------------------------------------------


def test_20_steps_at_the_recipe_s_rates_agree(answers: Answers):
    """With dropout, in float64."""
    assert answers.ranks["pair"][0]["double"] == pytest.approx(in_double(SINGLE_RANK), rel=1e-10)


def test_20_steps_begun_on_two_ranks_and_gone_on_on_others_are_one_rank_s(answers: Answers, tmp_path: Path):
    """Losses with dropout, and validation scores, agree to 1e-5 in float32, whether 1 or 4 ranks go on."""
    one, two, four = run(SINGLE_RANK, tmp_path), answers.ranks["pair"][0]["run"], answers.ranks["four"][0]["run"]
    assert (len(one["losses"]), len(two["losses"])) == (20, 7)
    shutil.copytree(answers.by_two.parent, tmp_path / "copy")
    for rest in (four, run(SINGLE_RANK, tmp_path / "copy")):
        assert two["losses"] + rest["losses"] == pytest.approx(one["losses"], rel=RELATIVE)
        for scores, expected in zip(two["scores"] + rest["scores"], one["scores"], strict=True):
            assert scores.loss == pytest.approx(expected.loss, rel=RELATIVE)
            assert (scores.top1, scores.images) == (expected.top1, 14)


def test_every_rank_knows_the_losses(answers: Answers):
    """So that all stop together where one is no number."""
    for kind in ("pair", "four"):
        assert len({tuple(answer["run"]["losses"]) for answer in answers.ranks[kind]}) == 1


def test_checkpoints_are_the_same_bytes_for_any_ranks(answers: Answers, tmp_path: Path):
    """Written by two ranks; read by four and by one, and written again."""
    one = tmp_path / answers.by_two.name
    model, optimizer, _ = make(SINGLE_RANK, recipe=GENTLE)
    checkpoint.save(one, model, optimizer, checkpoint.restore(answers.by_two, model, optimizer, SEED), SEED)
    for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE):
        expected = (answers.by_two / name).read_bytes()
        assert (one / name).read_bytes() == expected
        assert (answers.again_by_four / name).read_bytes() == expected
