"""tools/train.py with --change and --init-from: what a run records, resumes with and starts with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from model.changes import CHANGES
from model.checkpoint import WEIGHTS, load_model
from model.parallel.mesh import Place
from model.recipe import RECIPES
from tests.support.tool_runs import ROOT, TINY, losses, printed, tool
from tools.shared.job import resolve
from tools.train import arguments

LAST = "step-000000010"


def train(end_to_end: Path, runs: Path, *args: object) -> list[object]:
    sets = [end_to_end / "shards" / "train", "--val", end_to_end / "shards" / "val"]
    return ["train", *sets, "--runs", runs, *TINY, "--stall-seconds", 0, *args]


def test_a_changed_run_is_recorded_resumed_and_evaluated(end_to_end: Path, tmp_path: Path):
    """config.json and the checkpoint name the changes; others are refused; evaluate.py builds the same network."""
    changes = ["--change", "tanh", "--change", "one-tower"]
    out = printed(tool(*train(end_to_end, tmp_path, "--run-name", "c", "--steps", 3, *changes)))
    assert "recipe     source2012 with one-tower, tanh, learning rates x 1" in out
    assert json.loads((tmp_path / "c/config.json").read_text())["must_match"]["recipe"]["changes"] == [
        "one-tower",
        "tanh",
    ]
    other = tool(*train(end_to_end, tmp_path, "--run-name", "c", "--steps", 4, "--change", "tanh", "--resume"))
    assert other.returncode == 2 and "begun with recipe" in other.stderr
    printed(tool(*train(end_to_end, tmp_path, "--run-name", "c", "--steps", 4, *changes, "--resume")))
    assert [step for step, _ in losses(tmp_path / "c")] == [1, 2, 3, 4]
    checkpoint = tmp_path / "c/checkpoints/step-000000004"
    assert load_model(checkpoint, RECIPES).recipe.structure == "one-tower"
    assert "top-1" in printed(tool("evaluate", end_to_end / "shards" / "val", checkpoint))


def test_convolutions_are_copied_and_the_rest_starts_anew(end_to_end: Path, tmp_path: Path):
    """Before the first step all convolutions are those of the checkpoint; fully connected layers are not. At learning
    rates near 0 they still are after a step. The source may be gone when the run is resumed."""
    source = tmp_path / "source" / LAST
    shutil.copytree(end_to_end / "a/checkpoints" / LAST, source)
    args = ["--run-name", "t", "--init-from", source, "--init-layers", "convolutions"]
    args += ["--change", "sixth-conv", "--lr-scale", 1e-9]
    out = printed(tool(*train(end_to_end, tmp_path, *args, "--steps", 1)))
    assert f"transfer   conv1, conv2, conv3, conv4, conv5 of {source}\n" in out
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "t/checkpoints/step-000000001" / WEIGHTS)
    for name, values in before.items():
        assert torch.allclose(after[name], values, atol=1e-6) == name.startswith("conv"), name
    shutil.rmtree(source)
    assert "resumed" in printed(tool(*train(end_to_end, tmp_path, *args, "--steps", 2, "--resume")))


def test_one_tower_is_not_divided_between_ranks(end_to_end: Path):
    """Before anything is written. With the layout "data" each rank holds the network."""
    args = arguments().parse_args([str(end_to_end / "shards" / "train"), "--change", "one-tower"])
    pair = SimpleNamespace(place=Place(0, 2, 2), first=True, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"one tower cannot be divided between the ranks of a pair; add --layout data"):
        resolve(args, "cpu", pair)  # type: ignore[arg-type]


def test_the_page_lists_every_change():
    page = (ROOT / "docs" / "training.md").read_text()
    assert not [name for name, change in CHANGES.items() if f"| `{name}` | {change.summary} |" not in page]


def test_what_cannot_be_changed_or_copied_is_refused(end_to_end: Path, tmp_path: Path):
    """One line that says why, and no run folder remains."""
    source = end_to_end / "a/checkpoints" / LAST
    wrong = {
        ("--change", "conv-sd-0.03"): "change conv-sd-0.03 changes nothing in recipe source2012; leave it out",
        ("--init-from", tmp_path): "no checkpoint here (no state.json)",
        (
            "--init-from",
            source,
            "--width",
            0.2,
        ): "a network of width 0.05, expected 0.2; add --width 0.05",
    }
    for args, message in wrong.items():
        done = tool(*train(end_to_end, tmp_path, "--run-name", "w", *args))
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert not (tmp_path / "w").exists()
