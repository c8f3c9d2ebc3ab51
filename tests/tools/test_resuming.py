"""Resuming a run whose folder was changed or damaged, and scoring checkpoints on data that is not theirs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from model.run_lock import RunLock
from pipeline.shards.reader import open_shards
from tests.support.tool_runs import TINY, losses, metrics, printed, tool
from tools.shared import scoring
from tools.shared.checkpoint_data import classes_of


def arguments(root: Path, run: Path, *options: object) -> list[object]:
    """Those of run `a`, without a report, for a copy of it."""
    sets = [root / "shards" / "train", "--val", root / "shards" / "val"]
    return [*sets, "--runs", run.parent, "--run-name", run.name, "--epochs", 2, *TINY, "--stall-seconds", 0, *options]


@pytest.fixture
def run(end_to_end: Path, tmp_path: Path) -> Path:
    """A copy of run `a`, which has checkpoints at the steps 5 and 10."""
    return Path(shutil.copytree(end_to_end / "a", tmp_path / "run"))


def damaged_val(root: Path, folder: Path) -> Path:
    """A copy of the validation set in which one image is overwritten with zeros; the times of its tar are kept."""
    val = Path(shutil.copytree(root / "shards" / "val", folder / "val"))
    shards = open_shards(val)
    row = shards.index[3]
    path = shards.tars[row["shard"]]
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(row["offset"])
        file.write(b"\0" * int(row["size"]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return val


def test_an_image_that_damages_the_validation_does_not_cost_the_epoch(end_to_end: Path, tmp_path: Path):
    """The epoch is saved before its validation. With --on-bad-sample skip the score says how many images it lacks."""
    run, val = tmp_path / "bad_val", damaged_val(end_to_end, tmp_path)
    args = [*arguments(end_to_end, run), "--val", val]
    stopped = tool("train", *args)
    assert stopped.returncode == 2 and "cannot be decoded" in stopped.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000005"]
    out = printed(tool("train", *args, "--resume", "--on-bad-sample", "skip"))
    assert "resumed    after optimizer step 5" in out and out.count(", without 1 damaged image of 12") == 2
    assert losses(run) == losses(end_to_end / "a")
    validations = [line for line in metrics(run) if "val_loss" in line]
    assert [(line["step"], line["val_left_out"]) for line in validations] == [(5, 1), (10, 1)]
    last = run / "checkpoints" / "step-000000010"
    assert tool("evaluate", val, last).returncode == 2
    skipped = tool("evaluate", val, last, "--on-bad-sample", "skip")
    assert ", 11 images, without 1 damaged" in printed(skipped)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(run: Path, end_to_end: Path):
    last = run / "checkpoints" / "step-000000010"
    (last / "weights.safetensors").write_bytes((last / "weights.safetensors").read_bytes()[:1000])
    done = tool("train", *arguments(end_to_end, run, "--resume"))
    assert "resumed    after optimizer step 5, epoch 1" in printed(done)
    assert "weights.safetensors: damaged" in done.stderr and "step-000000005, the last whole checkpoint" in done.stderr
    assert losses(run) == losses(end_to_end / "a")
    assert sorted(path.name for path in last.parent.iterdir()) == [
        "step-000000005",
        "step-000000010",
        "step-000000010.damaged",
    ]


def test_resuming_from_an_earlier_checkpoint(run: Path, end_to_end: Path):
    """The later one is kept under another name; the losses are those of the first time."""
    earlier = run / "checkpoints" / "step-000000005"
    printed(tool("train", *arguments(end_to_end, run, "--resume-from", earlier)))
    assert losses(run) == losses(end_to_end / "a")
    assert (run / "checkpoints" / "step-000000010.replaced").is_dir()
    assert len([line for line in metrics(run) if "val_loss" in line]) == 2


def test_no_whole_checkpoint_is_an_error(run: Path, end_to_end: Path):
    """Training would otherwise begin at step 0 without a word."""
    for path in (run / "checkpoints").iterdir():
        (path / "velocities.safetensors").unlink()
    done = tool("train", *arguments(end_to_end, run, "--resume"))
    assert done.returncode == 2 and "no checkpoint is whole" in done.stderr
    assert done.stderr.count("velocities.safetensors: missing") == 2


def test_a_run_whose_checkpoints_are_gone_says_that_it_begins_again(run: Path, end_to_end: Path):
    shutil.rmtree(run / "checkpoints")
    done = tool("train", *arguments(end_to_end, run, "--resume"))
    printed(done)
    assert "no checkpoint, though the run has taken steps; training begins again at step 0" in done.stderr
    assert losses(run) == losses(end_to_end / "a")


def test_a_second_start_of_a_run_is_refused(run: Path, end_to_end: Path):
    with RunLock(run / "run.lock"):
        done = tool("train", *arguments(end_to_end, run, "--resume"))
    assert done.returncode == 2 and f"process {os.getpid()} on " in done.stderr
    assert metrics(run) == metrics(end_to_end / "a")


def test_the_learning_rates_may_be_scaled_on_resuming(run: Path, end_to_end: Path):
    """As the message about a loss that is not finite advises. config.json records it."""
    shutil.rmtree(run / "checkpoints" / "step-000000010")
    out = printed(tool("train", *arguments(end_to_end, run, "--resume", "--lr-scale", 0.5)))
    assert "changed    lr_scale 1.0, now 0.5" in out
    before, after = ([line["lr"] for line in metrics(path) if "lr" in line] for path in (end_to_end / "a", run))
    assert after == [*before[:5], *(0.5 * lr for lr in before[5:])]
    assert json.loads((run / "config.json").read_text())["changes"][0]["now"] == 0.5


def test_a_run_that_ends_within_an_epoch_is_validated_once(tmp_path: Path, end_to_end: Path):
    """With --steps. A run that is complete is not validated again."""
    run = tmp_path / "short"
    args = [option for option in arguments(end_to_end, run, "--steps", 3) if option not in ("--epochs", 2)]
    for options in ([], ["--resume"]):
        printed(tool("train", *args, *options))
        assert [line["step"] for line in metrics(run) if "val_loss" in line] == [3]


def test_evaluate_needs_the_checkpoint_and_the_shards_only(run: Path, end_to_end: Path, tmp_path: Path):
    """Neither the training tars nor an eigenbasis: the scores are those of the run's validation."""
    val = Path(shutil.copytree(end_to_end / "shards" / "val", tmp_path / "alone" / "val"))
    printed(tool("evaluate", val, run / "checkpoints" / "step-000000010", "--json", tmp_path / "scores.json"))
    (scores,) = json.loads((tmp_path / "scores.json").read_text())["checkpoints"].values()
    assert scores["loss"] == pytest.approx(metrics(run)[-1]["val_loss"], rel=1e-6)


def test_evaluate_refuses_another_mean(run: Path, end_to_end: Path, tmp_path: Path):
    """--force scores with the checkpoint's own mean."""
    shards = Path(shutil.copytree(end_to_end / "shards", tmp_path / "shards"))
    path = shards / "train" / "eigenbasis.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "mean": [1.0, 2.0, 3.0]}))
    last = run / "checkpoints" / "step-000000010"
    done = tool("evaluate", shards / "val", last)
    assert done.returncode == 2 and "but" in done.stderr and "has 1.0, 2.0, 3.0; score on" in done.stderr
    assert "top-1" in printed(tool("evaluate", shards / "val", last, "--force"))


def test_evaluate_refuses_other_classes(end_to_end: Path):
    """As many classes, but another one: labels would mean something else."""
    shards = open_shards(str(end_to_end / "shards" / "val"))
    trained = classes_of(shards.manifest)
    scoring.check_classes(Path("c"), trained, shards)
    for wnid in ("n99999999", "n00000000"):
        classes = tuple(replace(one, wnid=wnid) if n == 1 else one for n, one in enumerate(shards.manifest.classes))
        shards.manifest = replace(shards.manifest, classes=classes)
        with pytest.raises(ValueError, match=rf"c: class 1 is {trained[1][0]}, but {wnid} in .*, or add --force"):
            scoring.check_classes(Path("c"), trained, shards)
