"""tools/learning_table.py: trains rows, keeps their record, draws it again; and the record that docs/ holds."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from model.alexnet import AlexNet
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.recipe import PAPER, SOURCE2012, learning_rates
from model.shapes import NetSpec
from model.trainer import train_step
from tests.support.rank_jobs import global_batch
from tests.support.tool_runs import ROOT, metrics, printed, tool
from tools.learning_table import BEGIN, END
from tools.shared.first_step import relative_changes, slowest_change
from tools.shared.learning_curves import curves_svg, smoothed
from tools.shared.learning_rows import ROWS, LearningRun, Record, options_of, table
from tools.train import arguments

DOCS = ROOT / "docs"
SETTING = {"images": 80, "val_images": 20, "classes": 10, "batch": 8, "width": 1.0, "steps": 30, "machine": "-"}


def simulated(row: str, seed: int, losses: list[float], top1: float = 0.5) -> LearningRun:
    steps = [10 * number for number in range(1, len(losses) + 1)]
    pairs = [[step, loss] for step, loss in zip(steps, losses, strict=True)]
    return LearningRun(row, seed, "2026-01-01", "0", pairs, [[steps[-1], top1]])


def files(folder: Path) -> list[object]:
    return [word for name in ("record", "page", "plot") for word in (f"--{name}", folder / name)]


@pytest.mark.slow
def test_rows_are_trained_once_and_drawn_again_without_runs(end_to_end: Path, tmp_path: Path):
    """One row, one seed, two steps. A second call repeats no run, and the record alone gives the same files."""
    shards, row = end_to_end / "shards", "source2012+no-lrn"
    sizes = ["--seeds", 1, "--steps", 2, "--batch", 8, "--width", 0.05, "--log-every", 1]
    args = [shards / "train", "--val", shards / "val", "--runs", tmp_path / "runs", *sizes, *files(tmp_path)]
    args += ["--row", row]
    assert "1 runs of 1 rows" in printed(tool("learning_table", *args))
    folder = tmp_path / "runs" / f"{row}-s1"
    config = json.loads((folder / "config.json").read_text())
    assert config["must_match"]["recipe"]["changes"] == ["constant-lr", "no-lrn"]
    made = {name: (tmp_path / name).read_text() for name in ("record", "page", "plot")}
    (written,) = Record.load(tmp_path / "record").of_row(row)
    assert [loss for _, loss in written.losses] == [
        round(line["loss"], 4) for line in metrics(folder) if "loss" in line
    ]
    trained_at = (folder / "metrics.jsonl").stat().st_mtime_ns
    printed(tool("learning_table", *args))
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == trained_at
    shutil.rmtree(tmp_path / "runs")
    printed(tool("learning_table", "--runs", tmp_path / "runs", *files(tmp_path)))
    assert made == {name: (tmp_path / name).read_text() for name in ("record", "page", "plot")}


def test_wrong_calls_are_refused(tmp_path: Path):
    wrong = {
        ("--row", "source2012"): r"no record, and no complete run in",
        (tmp_path,): "add --val SHARDS",
        (tmp_path, "--val", tmp_path, "--row", "caffe"): "no row is called caffe; choose from source2012, ",
    }
    for args, message in wrong.items():
        done = tool("learning_table", *args, "--runs", tmp_path, *files(tmp_path))
        assert done.returncode == 2 and message in done.stderr


def test_every_row_is_a_command_that_train_accepts():
    parse = arguments().parse_args
    for row in ROWS:
        args = parse(["SHARDS", *options_of(row)])
        assert args.recipe in (SOURCE2012.name, PAPER.name) and args.change[0] == "constant-lr"


def test_the_table_counts_steps_at_chance_and_shows_the_spread():
    """Chance for 10 classes is 2.303: a run leaves it at its first line of metrics below 98 % of that."""
    runs = [
        simulated("source2012", 1, [2.4, 2.2, 1.5], 0.4),
        simulated("source2012", 2, [2.3, 2.3, 2.2], 0.5),
        simulated("paper", 1, [2.31, 2.3, 2.29], 0.1),
        simulated("paper", 2, [2.31, 2.3], 0.2),  # not complete yet
    ]
    lines = table(Record(SETTING, runs, {"paper": 0.000123})).splitlines()
    assert lines[0].endswith("| top-1 after 18 | top-1 after 30 |")
    assert lines[2].endswith("|  | 2 | 20 to 30 | 45.0% (40.0% to 50.0%) | 45.0% (40.0% to 50.0%) |")
    assert lines[3].endswith("| 0.012 % | 2 | all 20 to all 30 | 15.0% (10.0% to 20.0%) | 10.0%, 1 of 2 seeds |")


def test_a_record_keeps_one_run_for_each_row_and_seed(tmp_path: Path):
    """A newer run replaces the older one; rows come in the order of the table; saved is loaded."""
    old, new = simulated("paper", 1, [2.0]), simulated("paper", 1, [1.0])
    record = Record(SETTING, [old], {"paper": 0.5}).with_runs([new, simulated("source2012", 3, [1.5])])
    assert [run.row for run in record.runs] == ["source2012", "paper"]
    record.save(tmp_path / "record")
    assert Record.load(tmp_path / "record") == record


def test_curves_have_a_line_for_each_run_and_are_smoothed():
    runs = [simulated(row, seed, [2.0, 1.0]) for row in ("paper", "paper+bias-0", "source2012+tanh") for seed in (1, 2)]
    image = ET.fromstring(curves_svg(Record(SETTING, runs)))
    titles = [text.text for text in image.iter("{http://www.w3.org/2000/svg}text") if text.get("font-weight")]
    assert len(list(image.iter("{http://www.w3.org/2000/svg}polyline"))) == 2 + 2 + 4  # "paper" is in two panels
    assert titles == ["The two recipes", "Changes of source2012: layers", "Changes of paper"]
    assert smoothed(runs[0]) == [(10, 2.0), (20, 1.5)]


def test_the_first_step_is_what_the_optimizer_does():
    """The relative change is that of one step of `Momentum2012` without decay. The recipe of the paper changes its
    slowest layer less than the source does, because its weights of conv3 to conv5 are a third as large."""
    spec, batch = NetSpec(5, 0.05), global_batch(0, 0)
    found = relative_changes("source2012", spec, batch, seed=1)
    rules = replace(SOURCE2012, weight_decay=0.0)
    net = AlexNet(spec, rules, seed=1)
    before = {name: net.get_parameter(f"{name}.weight").detach().clone() for name in found}
    optimizer = Momentum2012(net.named_parameters(), rules, learning_rates(rules, 0, 91))
    train_step(net, optimizer, batch, DropoutDraws(1, 0))
    for name, value in before.items():
        moved = float((net.get_parameter(f"{name}.weight").detach() - value).norm() / value.norm())
        assert found[name] == pytest.approx(moved, rel=1e-2)
    assert slowest_change("paper", spec, batch) < slowest_change("source2012", spec, batch) / 1.5


def test_the_page_and_its_curves_are_those_of_its_record():
    """docs/training.md and docs/training.svg are what `python tools/learning_table.py` makes of docs/training.json."""
    record = Record.load(DOCS / "training.json")
    inside = (DOCS / "training.md").read_text().partition(BEGIN)[2].partition(END)[0]
    assert inside.strip() == table(record)
    assert (DOCS / "training.svg").read_text() == curves_svg(record)


def test_the_default_leaves_its_plateau_on_every_seed_of_the_record():
    record = Record.load(DOCS / "training.json")
    stays = [run.steps_at_chance(record.setting["classes"]) for run in record.of_row("source2012")]
    assert len(stays) >= 3 and None not in stays
