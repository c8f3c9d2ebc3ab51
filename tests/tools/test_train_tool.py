"""tools/train.py and tools/evaluate.py on a tiny sample: what a run writes, and how it resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.recipe import RECIPES
from pipeline import rgb_pca
from tests.support.shard_fixtures import basis_of, sample, write_set
from tests.support.tool_runs import TINY, losses, metrics, printed, start, tool


def test_a_run_writes_what_its_help_says(end_to_end: Path):
    run, steps = end_to_end / "a", 47 // 8
    assert [step for step, _ in losses(run)] == list(range(1, 2 * steps + 1))
    assert sum("val_top1" in line for line in metrics(run)) == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{n * steps:09d}" for n in (1, 2)]
    config = json.loads((run / "config.json").read_text())
    assert config["must_match"]["recipe"]["name"] == "source2012"
    assert config["must_match"]["decoding"] == {"hw_decoder_load": 0.0}
    stall = json.loads((run / "stall.json").read_text())
    assert min(1, stall["au"]) == pytest.approx(1 - sum(stall["parts"].values()))
    assert stall["environment"]["manifest_sha256"] == config["must_match"]["train_manifest_sha256"]
    assert stall["verdict"] in (run / "report.html").read_text()
    assert json.loads((end_to_end / "pca.json").read_text())["pixel_scale"] == 255


@pytest.mark.slow
def test_a_run_that_sigterm_stops_resumes_to_the_same_losses(end_to_end: Path):
    """SIGTERM during training: exit code 0 and a checkpoint. With --resume the losses are those of a run never stopped.

    Both processes start as a user starts them: as a script, and as a module.
    """
    args = [end_to_end / "shards" / "train", "--runs", end_to_end, "--run-name", "stopped", "--epochs", 2, *TINY]
    process, written = start("train", *args), end_to_end / "stopped" / "metrics.jsonl"
    while not (written.is_file() and written.read_text()) and process.poll() is None:
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    again = start("train", *args, "--stall-seconds", 0, "--resume", module=True)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert losses(end_to_end / "stopped") == losses(end_to_end / "a")


def test_a_run_that_was_killed_resumes_to_the_same_losses(end_to_end: Path):
    """As after SIGKILL: the last checkpoint is left, and metrics of later steps."""
    run = end_to_end / "killed"
    shutil.copytree(end_to_end / "a", run)
    shutil.rmtree(run / "checkpoints" / "step-000000010")
    (run / "stall.json").unlink()
    sets = [end_to_end / "shards" / "train", "--val", end_to_end / "shards" / "val"]
    args = [*sets, "--runs", end_to_end, "--run-name", "killed", "--epochs", 2, *TINY, "--resume"]
    assert "resumed    after optimizer step 5, epoch 1\n" in printed(tool("train", *args))
    assert losses(run) == losses(end_to_end / "a")
    assert (run / "stall.json").is_file()


def test_resuming_a_complete_run_says_so(end_to_end: Path, tmp_path: Path):
    shutil.copytree(end_to_end / "a", tmp_path / "a")  # resuming without --val is recorded in the run
    args = [end_to_end / "shards" / "train", "--runs", tmp_path, "--run-name", "a", "--epochs", 2, *TINY, "--resume"]
    assert "this run is complete" in printed(tool("train", *args))


def test_a_damaged_image_stops_training_or_is_skipped_and_named(tmp_path: Path):
    """By default one line names the image. With --on-bad-sample skip the run completes, and names it at its end."""
    for name in ("damaged", "intact"):
        (tmp_path / name).mkdir()
    damaged = write_set(tmp_path / "damaged", [sample(n, b"garbage" * 9 if n == 5 else None) for n in range(17)])
    intact = basis_of(write_set(tmp_path / "intact", [sample(n) for n in range(17)]))
    basis = replace(intact, manifest_sha256=damaged.manifest_sha256)
    rgb_pca.save(basis, rgb_pca.eigenbasis_path(tmp_path / "damaged"))
    args = [tmp_path / "damaged", "--runs", tmp_path, "--epochs", 1, *TINY, "--stall-seconds", 0]
    stopped = tool("train", *args, "--run-name", "stopped")
    assert stopped.returncode == 2 and "drawn_0005 (it does not start as a JPEG" in stopped.stderr
    out = printed(tool("train", *args, "--run-name", "skipped", "--order", "windowed", "--on-bad-sample", "skip"))
    assert "skipped 1 damaged image:" in out and "drawn_0005 (it does not start as a JPEG" in out
    assert [step for step, _ in losses(tmp_path / "skipped")] == [1, 2]
    config = json.loads((tmp_path / "skipped" / "config.json").read_text())
    assert config["must_match"]["order"] == ["windowed", 16] and config["loader"]["order"] == "windowed"


def test_evaluate_agrees_with_the_validation_of_the_run(end_to_end: Path, tmp_path: Path):
    path, val = end_to_end / "a" / "checkpoints" / "step-000000010", end_to_end / "shards" / "val"
    printed(tool("evaluate", val, path, "--json", tmp_path / "scores.json"))
    scores = json.loads((tmp_path / "scores.json").read_text())["checkpoints"][str(path)]
    last = metrics(end_to_end / "a")[-1]
    assert scores["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert (scores["top1"], scores["images"]) == (last["val_top1"], 12)
    assert "top-5" in printed(tool("evaluate", val, path, "--views", 10))


def test_fine_tuning_keeps_the_frozen_layers_and_learns_the_others(end_to_end: Path, tmp_path: Path):
    """A new run on the layers of another one. It resumes to the same losses, also without that checkpoint."""
    source = shutil.copytree(end_to_end / "a" / "checkpoints" / "step-000000010", tmp_path / "step-000000010")
    args = [end_to_end / "shards" / "train", "--runs", tmp_path, "--epochs", 2, *TINY, "--stall-seconds", 0]
    tuning = [*args, "--seed", 5, "--init-from", source, "--freeze", "convolutions"]
    out = printed(tool("train", *tuning, "--run-name", "tuned"))
    assert f"all-but-fc8 of {source}; frozen: conv1, conv2, conv3, conv4, conv5" in out
    before, after = (
        dict(load_model(path, RECIPES).named_parameters())
        for path in (source, tmp_path / "tuned" / "checkpoints" / "step-000000010")
    )
    same = {name.partition(".")[0] for name in before if torch.equal(before[name], after[name])}
    assert same == {"conv1", "conv2", "conv3", "conv4", "conv5"}
    shutil.copytree(tmp_path / "tuned", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000000010")
    shutil.rmtree(source)
    printed(tool("train", *tuning, "--run-name", "again", "--resume"))
    assert losses(tmp_path / "again") == losses(tmp_path / "tuned")
    refused = tool("train", *args, "--seed", 5, "--run-name", "tuned", "--resume")
    assert refused.returncode == 2 and "tuned: begun with" in refused.stderr
