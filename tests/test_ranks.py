"""Towers on several ranks are the towers on one: numbers, bytes, checkpoints, resuming. Real processes, on gloo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import BATCH, SMALL, first_step, global_batch, make, run, run_ranks, save_again

from model import checkpoint
from model.alexnet import TOWERS, NetSpec, tower_slice
from model.exchange import crossing_numbers, step_bytes
from model.ranks import ALONE, Place
from model.recipe import SOURCE2012

RELATIVE = 1e-5
GROUPS = [(2, "towers"), (4, "towers"), (2, "data")]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 1e-5 of the tensor's own scale."""
    return bool((found - expected).abs().max() <= RELATIVE * expected.abs().max())


@pytest.fixture(scope="module", params=GROUPS, ids=lambda group: f"{group[0]} {group[1]}")
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The first step on each rank."""
    world, layout = request.param
    return run_ranks(tmp_path_factory.mktemp("steps"), world, first_step, layout=layout)


def test_images_after_the_swap_are_one_rank_s(steps: list[dict[str, Any]]):
    """Bit for bit, in its order: both ranks of a pair have its rows, and the pairs' one after another are the batch."""
    whole = global_batch(0, 0)
    for name in ("images", "labels"):
        for towers in {step["place"].towers for step in steps}:
            rows = [step[name] for step in steps if step["place"].towers == towers]
            assert torch.equal(torch.cat(rows), getattr(whole, name))


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
    same_step(steps, first_step(ALONE))


def test_no_parameter_is_held_twice_within_a_pair(steps: list[dict[str, Any]]):
    """Both ranks' parameters together are the network's."""
    place = steps[0]["place"]
    whole = sum(parameter.numel() for parameter in make(ALONE)[0].parameters())
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


def test_the_full_network_on_a_pair_is_the_one_on_one_rank(tmp_path: Path):
    """At width 1 with 1,000 classes."""
    same_step(run_ranks(tmp_path, 2, first_step, NetSpec(), 2), first_step(ALONE, NetSpec(), 2))


def test_bfloat16_crosses_as_bfloat16(tmp_path: Path):
    """Half the bytes, counted and calculated; a step differs from one rank's by rounding."""
    pair, one = run_ranks(tmp_path, 2, first_step, SMALL, BATCH, "bfloat16"), first_step(ALONE, precision="bfloat16")
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


# ---- runs and checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """20 steps on one rank: the folder of its checkpoints and what it returned."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(ALONE, folder)


@pytest.mark.parametrize("world", [2, 4])
def test_20_steps_stopped_on_these_ranks_and_gone_on_on_others_are_one_rank_s(world: int, whole, tmp_path: Path):
    """Losses with dropout, and validation scores, agree to 1e-5, whatever ranks begin and whatever ranks go on."""
    _, one = whole
    first, *_ = run_ranks(tmp_path / "first", world, run, tmp_path / "run", 7)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    second = run(ALONE, tmp_path / "run")
    assert first["losses"] + second["losses"] == pytest.approx(one["losses"], rel=RELATIVE)
    other, *_ = run_ranks(tmp_path / "second", 6 - world, run, tmp_path / "copy")
    assert first["losses"] + other["losses"] == pytest.approx(one["losses"], rel=RELATIVE)
    for scores, expected in zip(first["scores"] + other["scores"], one["scores"], strict=True):
        assert (scores.loss, scores.top1) == (pytest.approx(expected.loss, rel=RELATIVE), expected.top1)
        assert scores.images == 14
    assert len(one["losses"]) == 20


@pytest.mark.parametrize("world", [2, 4])
def test_checkpoints_are_the_same_bytes_for_any_ranks(world: int, whole, tmp_path: Path):
    """Written by one rank, read and written by 2 or 4, read by one and written again."""
    source = checkpoint.latest(whole[0])
    assert source is not None
    run_ranks(tmp_path, world, save_again, source, tmp_path / "several" / source.name)
    save_again(ALONE, tmp_path / "several" / source.name, tmp_path / "one" / source.name)
    for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE):
        assert (tmp_path / "several" / source.name / name).read_bytes() == (source / name).read_bytes()
        assert (tmp_path / "one" / source.name / name).read_bytes() == (source / name).read_bytes()
