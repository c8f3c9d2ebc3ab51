"""Checkpoints: complete or absent, restored bit for bit, and refused with a clear message if they do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState, last_whole, latest, load_data, load_model, restore, save
from model.data_record import DataRecord
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
    older = checkpoint.FORMAT.replace("version 3", "version 2")
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


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE])
def test_a_flipped_bit_is_found(saved: Path, name: str):
    """Every file is checked by its SHA-256; in state.json a changed number would otherwise be read as it is."""
    data = bytearray((saved / name).read_bytes())
    at = data.index(b'"seed": 9') + 8 if name == checkpoint.STATE else len(data) - 5
    data[at] ^= 1
    (saved / name).write_bytes(data)
    assert len(checkpoint.faults(saved)) == 1
    for load in (lambda: restore(saved, *network(), seed=9), lambda: load_model(str(saved), RECIPES)):
        with pytest.raises(ValueError, match=rf"{name}: damaged \(its .*SHA-256.*--resume-from CHECKPOINT"):
            load()


def test_the_last_whole_checkpoint_is_found_and_every_damaged_file_is_named(saved: Path):
    folder = saved.parent
    for steps in (2, 3):
        save(folder / f"step-{steps:09d}", *network(), replace(STATE, optimizer_steps=steps), seed=9)
    (folder / "step-000000002" / checkpoint.VELOCITIES).unlink()
    for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES):
        (folder / "step-000000003" / name).write_bytes(b"short")
    path, faults = last_whole(folder)
    assert path == saved
    assert [fault.split(": ")[0].removeprefix(f"{folder}/") for fault in faults] == [
        "step-000000003/weights.safetensors",
        "step-000000003/velocities.safetensors",
        "step-000000002/velocities.safetensors",
    ]


def test_a_damaged_checkpoint_is_written_again(saved: Path):
    """Saving the same state skips the write only if the files are whole."""
    model, optimizer = network()
    state = restore(saved, model, optimizer, seed=9)
    (saved / checkpoint.WEIGHTS).write_bytes(b"short")
    save(saved, model, optimizer, state, seed=9)
    assert checkpoint.faults(saved) == []


@pytest.mark.parametrize(
    "name", ["step-000000001-keep", "step-000000040.bak", "step-40", "step-best", ".step-000000001.tmp-mine"]
)
def test_folders_with_other_names_are_left_alone(saved: Path, name: str):
    """A copy beside a checkpoint is neither removed, nor resumed from, nor in the way."""
    folder = saved.parent
    shutil.copytree(saved, folder / name)
    save(folder / "step-000000002", *network(), replace(STATE, optimizer_steps=2), seed=9)
    checkpoint.prune(folder, 1)
    assert checkpoint.optimizer_steps(folder) == 2
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "step-000000002"])


def test_a_file_with_the_name_of_a_temporary_folder_is_left_alone(saved: Path):
    (saved.parent / ".step-000000009.tmp").write_text("of the user")
    checkpoint.prune(saved.parent, 1)
    assert (saved.parent / ".step-000000009.tmp").is_file()


def test_a_validation_changes_the_state_only(saved: Path):
    before = (saved / checkpoint.WEIGHTS).stat().st_ino
    checkpoint.update_state(saved, replace(STATE, val_error=0.5))
    assert restore(saved, *network(), seed=9).val_error == 0.5
    assert (saved / checkpoint.WEIGHTS).stat().st_ino == before and checkpoint.faults(saved) == []


def test_the_best_is_chosen_among_validations_on_the_last_set(tmp_path: Path):
    """Errors on two validation sets are not comparable."""
    for steps, (error, val_set) in enumerate([(0.1, "old"), (0.4, "new"), (0.5, "new")]):
        state = replace(STATE, optimizer_steps=steps, val_error=error, val_set=val_set)
        save(tmp_path / checkpoint.name_of(state), *network(), state, seed=9)
    assert checkpoint.best(tmp_path) == tmp_path / "step-000000001"


def test_a_checkpoint_knows_its_data(tmp_path: Path):
    data = DataRecord([["n1", "cat"]], "0" * 64, 7, {"mean": torch.ones(3, dtype=torch.float64)}, {"torch": "2"})
    save(tmp_path / "step-000000001", *network(), STATE, seed=9, data=data)
    found = load_data(str(tmp_path / "step-000000001"))
    assert found.record() == data.record()
    assert torch.equal(found.arrays["mean"], data.arrays["mean"])


def test_the_learning_rates_may_be_scaled_on_resuming(saved: Path):
    assert restore(saved, *network(replace(SOURCE2012, learning_rate_scale=0.5)), seed=9) == STATE
