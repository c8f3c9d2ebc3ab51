"""Checkpoints: complete or absent, restored bit for bit, and refused with a clear message if they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState, latest, load_model, restore, save
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.parallel.ranks import SINGLE_RANK
from model.recipe import PAPER, RECIPES, SOURCE2012, PlateauState, Recipe, learning_rates
from model.shapes import NetSpec
from model.trainer import train_step
from tests.support.rank_jobs import global_batch, make

STATE = TrainState(0, 1, 1, PlateauState(best_error=0.1, reductions=1), [2.5, 1 / 3], [0.25])


def network(recipe: Recipe = SOURCE2012) -> tuple[AlexNet, Momentum2012]:
    return make(SINGLE_RANK, recipe=recipe)[:2]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer = network()
    train_step(model, optimizer, global_batch(0, 0), DropoutDraws(9, 0))
    save(tmp_path / "step-000000001", model, optimizer, STATE, seed=9)
    return tmp_path / "step-000000001"


def test_saved_is_restored_bit_for_bit(saved: Path):
    """State, weights and velocities are those of the network that was saved."""
    model, optimizer = network()
    assert restore(saved, model, optimizer, seed=9) == STATE
    again, its_optimizer = network()
    train_step(again, its_optimizer, global_batch(0, 0), DropoutDraws(9, 0))
    for (name, found), expected in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(optimizer.velocities()[name], its_optimizer.velocities()[name])
    assert torch.equal(load_model(saved, RECIPES).conv1.weight, model.conv1.weight)


def test_a_checkpoint_of_another_recipe_network_or_seed_is_refused(saved: Path):
    with pytest.raises(ValueError, match=r"with another recipe \(name 'source2012', now 'paper'\)"):
        restore(saved, *network(PAPER), seed=9)
    other = AlexNet(NetSpec(classes=5, width=0.1))
    optimizer = Momentum2012(other.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 1))
    with pytest.raises(ValueError, match=r"with another network \(width 0.05, now 0.1\)"):
        restore(saved, other, optimizer, seed=9)
    with pytest.raises(ValueError, match=r"with another seed \(9, now 10\)"):
        restore(saved, *network(), seed=10)


def test_a_checkpoint_of_an_older_format_is_refused(saved: Path):
    """The message names both formats and says what to do."""
    record = json.loads((saved / checkpoint.STATE).read_text())
    older = checkpoint.FORMAT.replace("version 2", "version 1")
    (saved / checkpoint.STATE).write_text(json.dumps({**record, "format": older}))
    with pytest.raises(ValueError, match=f"format '{older}', expected '{checkpoint.FORMAT}'; train again, or use"):
        restore(saved, *network(), seed=9)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE])
def test_a_damaged_checkpoint_is_named(saved: Path, name: str):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}: (missing or )?damaged"):
        restore(saved, *network(), seed=9)


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is written under a temporary name first, so half a checkpoint is never found."""
    monkeypatch.setattr(checkpoint, "VELOCITIES", "no/such/folder.safetensors")
    with pytest.raises(Exception, match="No such file"):
        save(tmp_path / "step-000000001", *network(), TrainState.start(), seed=9)
    assert latest(tmp_path) is None


def test_a_save_on_a_full_disk_leaves_nothing_behind(tmp_path: Path, small_files: None):
    """The OSError names the checkpoint, and no temporary folder takes the remaining space."""
    with pytest.raises(OSError, match="step-000000000: could not be saved"):
        save(tmp_path / "step-000000000", *network(), TrainState.start(), seed=9)
    assert list(tmp_path.iterdir()) == []


def test_the_same_state_is_not_written_again_and_a_validated_one_replaces_it(saved: Path):
    """The files of an unchanged checkpoint stay; with a validation error the folder is replaced as a whole."""
    model, optimizer = network()
    state = restore(saved, model, optimizer, seed=9)
    before = (saved / checkpoint.WEIGHTS).stat().st_ino
    save(saved, model, optimizer, state, seed=9)
    assert (saved / checkpoint.WEIGHTS).stat().st_ino == before
    save(saved, model, optimizer, replace(state, val_error=0.5), seed=9)
    assert restore(saved, model, optimizer, seed=9).val_error == 0.5
    assert list(saved.parent.iterdir()) == [saved]


def test_pruning_keeps_the_last_checkpoints_and_the_best(tmp_path: Path):
    """The best has the lowest validation error, the earliest of equal ones, read from the checkpoints themselves."""
    model = AlexNet(NetSpec(2, 0.01))
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 1))
    for optimizer_steps, error in enumerate([None, 0.5, 0.2, 0.2, 0.9, None, 0.3]):
        state = replace(TrainState.start(), optimizer_steps=optimizer_steps, val_error=error)
        save(tmp_path / checkpoint.name_of(state), model, optimizer, state, 9)
        checkpoint.prune(tmp_path, 2)
    assert checkpoint.best(tmp_path) == tmp_path / "step-000000002"
    assert [path.name[-1] for path in checkpoint.all_in(tmp_path)] == ["2", "5", "6"]
