"""tools/evaluate.py: ensembles, scores by class, figures, and the same scores on any number of ranks."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from model.class_scores import ClassScores
from tests.support.checkpoints import save_untrained
from tests.support.tool_runs import ENVIRONMENT, ROOT, printed, tool
from tools import evaluate
from tools.shared import confusion_figure


def checkpoints(root: Path) -> list[Path]:
    """The two checkpoints of run `a`."""
    return sorted((root / "a" / "checkpoints").iterdir())


def scored(root: Path, out: Path, *args: object) -> dict[str, Any]:
    """The JSON of an evaluation on the validation set."""
    printed(tool("evaluate", root / "shards" / "val", *args, "--device", "cpu", "--json", out))
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def without_loss(scores: dict[str, Any]) -> tuple[float, float, int]:
    return scores["top1"], scores["top5"], scores["images"]


def test_an_ensemble_of_one_checkpoint_twice_is_the_checkpoint(end_to_end: Path, tmp_path: Path):
    path = checkpoints(end_to_end)[-1]
    found = scored(end_to_end, tmp_path / "s.json", path, path)
    single = found["checkpoints"][str(path)]
    assert {name: found["ensemble"][name] for name in single} == single
    assert found["ensemble"]["weights"] == [0.5, 0.5]


def test_an_ensemble_scores_the_mean_of_the_probabilities(end_to_end: Path, tmp_path: Path):
    """Its loss is at most the mean of the losses: the logarithm is concave. Weights are fitted if asked for."""
    paths, train = checkpoints(end_to_end), end_to_end / "shards" / "train"
    found = scored(end_to_end, tmp_path / "s.json", *paths)
    losses = [found["checkpoints"][str(path)]["loss"] for path in paths]
    assert min(losses) - 1 < found["ensemble"]["loss"] < sum(losses) / 2
    fitted = scored(end_to_end, tmp_path / "f.json", *paths, "--fit-weights", train)
    assert fitted["ensemble"]["fitted_to"] == str(train) and fitted["checkpoints"] == found["checkpoints"]
    assert len(fitted["ensemble"]["weights"]) == 2


def test_networks_of_other_widths_and_means_are_scored_as_if_alone(end_to_end: Path, tmp_path: Path):
    """In one pass, each with its own mean image."""
    train, paths = end_to_end / "shards" / "train", [checkpoints(end_to_end)[-1]]
    for steps, width, brighter in ((7, 0.1, 0.0), (8, 0.05, 30.0)):
        paths.append(tmp_path / f"step-00000000{steps}")
        save_untrained(paths[-1], train, width, brighter)
    together = scored(end_to_end, tmp_path / "s.json", *paths, "--force")["checkpoints"]
    for path in paths:
        alone = scored(end_to_end, tmp_path / "a.json", path, "--force")["checkpoints"][str(path)]
        assert together[str(path)] == alone
    refused = tool("evaluate", end_to_end / "shards" / "val", *paths, "--device", "cpu")
    assert refused.returncode == 2 and "step-000000008: trained with the mean" in refused.stderr


def test_fitting_to_the_scored_images_is_said(end_to_end: Path):
    val = end_to_end / "shards" / "val"
    out = printed(tool("evaluate", val, *checkpoints(end_to_end), "--fit-weights", val, "--device", "cpu"))
    assert "fitted to the images on which they are scored" in out


def test_scores_by_class_agree_with_the_scores(end_to_end: Path, tmp_path: Path):
    path, table = checkpoints(end_to_end)[-1], tmp_path / "new" / "c.csv"
    printed(tool("evaluate", end_to_end / "shards" / "val", path, "--device", "cpu", "--per-class", table))
    found = scored(end_to_end, tmp_path / "s.json", path)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    images = [int(row["images"]) for row in rows]
    top1 = sum(float(row["top1"]) * count for row, count in zip(rows, images, strict=True)) / sum(images)
    assert (len(rows), sum(images)) == (3, 12)
    assert top1 == pytest.approx(found["checkpoints"][str(path)]["top1"], abs=1e-4)
    for pair in found["confused"]:
        row = rows[pair["label"]]
        assert float(row["taken_for_share"]) >= pair["share"] - 1e-4 and row["wnid"] == pair["wnid"]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_confusion_is_drawn(suffix: str, end_to_end: Path, tmp_path: Path):
    path, figure = checkpoints(end_to_end)[-1], tmp_path / f"c{suffix}"
    printed(tool("evaluate", end_to_end / "shards" / "val", path, "--device", "cpu", "--confusion", figure))
    if suffix == ".svg":
        words = " ".join(text.text or "" for text in ElementTree.parse(figure).iter("{http://www.w3.org/2000/svg}text"))
        assert "top-1" in words and "Most confused pairs" in words
    else:
        with Image.open(figure) as image:
            assert min(image.size) > 100 and len(np.unique(np.asarray(image))) > 1


def test_a_thousand_classes_are_drawn_as_groups_of_confused_neighbours():
    """Pairs of classes that are taken for each other end up in the same group, and every row adds up to 100 %."""
    classes, partner = 1000, np.random.default_rng(1).permutation(1000)
    confusion = np.zeros((classes, classes))
    confusion[np.arange(classes), np.arange(classes)] = 30
    confusion[partner[::2], partner[1::2]] = confusion[partner[1::2], partner[::2]] = 20
    order = confusion_figure.neighbours_first(confusion)
    place = np.argsort(order)
    assert (np.abs(place[partner[::2]] - place[partner[1::2]]) == 1).all()
    groups = confusion_figure.groups_of(order)
    assert len(groups) == 40 and sorted(np.concatenate(groups)) == list(range(classes))
    names = [f"class {n}" for n in range(classes)]
    shapes, width, height = confusion_figure.layout(confusion, names, "title", ["note"])
    assert sum(isinstance(shape, confusion_figure.Box) for shape in shapes) == 40 * 40
    assert max(width, height) < 1400
    assert ClassScores(torch.from_numpy(confusion), torch.zeros(classes)).confused_pairs(3)[0].share == 0.4


@pytest.mark.slow
def test_three_ranks_score_as_one(end_to_end: Path, tmp_path: Path):
    """Every sample is scored exactly once: the same hits, and the loss up to rounding. Ranks need no pairs."""
    paths, out = checkpoints(end_to_end), tmp_path / "three.json"
    one = scored(end_to_end, tmp_path / "one.json", *paths, "--batch", 5)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "tools/evaluate.py"]
    options = ["--batch", "5", "--device", "cpu", "--json", str(out)]
    command = [*torchrun, str(end_to_end / "shards" / "val"), *map(str, paths), *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    several = json.loads(out.read_text())
    assert len(done.stdout.splitlines()) == 3  # one rank prints
    pairs = [(one["checkpoints"][str(path)], several["checkpoints"][str(path)]) for path in paths]
    for ours, theirs in [*pairs, (one["ensemble"], several["ensemble"])]:
        assert without_loss(ours) == pytest.approx(without_loss(theirs))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_torchrun_takes_no_option_of_evaluate_for_its_own():
    ours = {option for action in evaluate.arguments()._actions for option in action.option_strings} - {"-h", "--help"}
    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert [(mine, other) for mine in ours for other in theirs if other.startswith(mine)] == []
