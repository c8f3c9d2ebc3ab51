"""The input of a run changes or fails while it trains: one line names the file, and no step is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from model import checkpoint
from tests.support.tool_runs import TINY, Done, losses, metrics, printed, tool
from tools.shared.training_run import TrainingRun


def arguments(train: Path, root: Path, run: Path, *options: object) -> list[object]:
    """Those of run `a`, without a report, on a copy of its training set."""
    sets = [train, "--val", root / "shards" / "val"]
    return [*sets, "--runs", run.parent, "--run-name", run.name, "--epochs", 2, *TINY, "--stall-seconds", 0, *options]


@pytest.fixture
def train(end_to_end: Path, tmp_path: Path) -> Path:
    """A copy of the training set."""
    return Path(shutil.copytree(end_to_end / "shards" / "train", tmp_path / "train"))


def test_a_tar_that_is_truncated_during_training_is_named_and_no_step_is_lost(
    train: Path, end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All tars are cut after the first step. The steps until the loader notices it are saved; resumed with the tars as
    they were, the losses are those of a run that was never disturbed."""
    tars, run = sorted(train.glob("*.tar")), tmp_path / "run"
    whole = [tar.read_bytes() for tar in tars]
    on_step = TrainingRun._on_step

    def cut(self: TrainingRun, *args: object) -> None:
        for tar in tars:
            os.truncate(tar, 1000)
        on_step(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_on_step", cut)
        stopped = tool("train", *arguments(train, end_to_end, run))
    out = printed(stopped, code=2)
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("train.py: ")]
    assert "1,000 bytes, expected " in line and "train-00000" in line and "make_shards" in line
    last = losses(run)[-1][0]
    assert 1 <= last < 10 and checkpoint.optimizer_steps(run / "checkpoints") == last
    assert f"saved after optimizer step {int(last)}; then the input failed" in out
    assert line.removeprefix("train.py: ") in (run / "train.log").read_text()
    for tar, data in zip(tars, whole, strict=True):
        tar.write_bytes(data)
    assert f"resumed    after optimizer step {int(last)}" in printed(resumed(train, end_to_end, run))
    assert losses(run) == losses(end_to_end / "a")


def resumed(train: Path, end_to_end: Path, run: Path) -> Done:
    """The same command with --resume."""
    return tool("train", *arguments(train, end_to_end, run, "--resume"))


def test_a_set_that_is_removed_during_training_changes_nothing(
    train: Path, end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The open tars keep their content."""
    on_step, run = TrainingRun._on_step, tmp_path / "run"

    def remove(self: TrainingRun, *args: object) -> None:
        shutil.rmtree(train, ignore_errors=True)
        on_step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingRun, "_on_step", remove)
    printed(tool("train", *arguments(train, end_to_end, run)))
    assert losses(run) == losses(end_to_end / "a")


def test_a_disk_that_fails_to_read_is_named(
    train: Path, end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """EIO, as of a broken disk or a lost network mount."""
    real, run = os.preadv, tmp_path / "run"

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    stopped = tool("train", *arguments(train, end_to_end, run))
    assert stopped.returncode == 2 and ".tar: cannot be read (Input/output error)" in stopped.stderr
    assert checkpoint.optimizer_steps(run / "checkpoints") == losses(run)[-1][0]


def test_a_final_validation_that_was_logged_but_not_saved_is_made_once(
    end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that ends within an epoch (--steps) dies between the two: its line is not doubled on resuming."""
    run = tmp_path / "short"
    args = [option for option in arguments(end_to_end / "shards" / "train", end_to_end, run) if option != "--epochs"]
    args.remove(2)
    save = TrainingRun._save

    def die(self: TrainingRun, state: checkpoint.TrainState) -> None:
        if state.val_error is not None:
            raise KeyboardInterrupt
        save(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_save", die)
        assert tool("train", *args, "--steps", 3).returncode == 130
    assert [line["step"] for line in metrics(run) if "val_loss" in line] == [3]
    printed(tool("train", *args, "--steps", 3, "--resume"))
    assert [line["step"] for line in metrics(run) if "val_loss" in line] == [3]
