"""metrics.prom, read back by prometheus-client's own parser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.runs import RunFolder
from pipeline.diagnosis.accounting import verdict_kind
from tests.support.tool_runs import TINY, metrics, printed, tool
from tools.shared.prometheus import METRICS, METRICS_PROM, Prometheus
from tools.shared.tracking import Tracking

parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")


def values(folder: Path) -> dict[tuple[str, str | None], float]:
    """Each sample of the file, by name and verdict. Every one has the run's name."""
    found = {}
    for family in parser.text_string_to_metric_families((folder / METRICS_PROM).read_text()):
        assert family.type == "gauge" and family.documentation
        for sample in family.samples:
            assert sample.labels["run"] == folder.name and sample.timestamp is None  # a collector refuses timestamps
            found[sample.name, sample.labels.get("verdict")] = sample.value
    return found


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "first").mkdir()
    return RunFolder(tmp_path / "first")


def test_the_file_has_the_last_value_of_each_metric(folder: RunFolder):
    logger = Prometheus(folder)
    logger.log({"step": 20, "loss": 6.9, "images_per_s": 800.0, "wait_share": 0.25, "au_estimate": 0.75, "lr/a.b": 1})
    logger.log({"step": 40, "loss": 6.5, "input_bound": True})
    assert values(folder.path) == {
        ("alexnet_optimizer_steps", None): 40,
        ("alexnet_loss", None): 6.5,
        ("alexnet_images_per_second", None): 800,
        ("alexnet_wait_ratio", None): 0.25,
        ("alexnet_au_estimate_ratio", None): 0.75,
        ("alexnet_input_bound", None): 1,
    }
    assert [path.name for path in folder.path.iterdir()] == [METRICS_PROM]  # no temporary file is left


def test_a_report_replaces_the_verdict_of_an_earlier_one(folder: RunFolder):
    class Nothing(Prometheus):
        def log(self, line: object) -> None:
            """Takes the place of JSON lines, which get no report."""
            raise AssertionError

    tracking = Tracking([Nothing(folder), Prometheus(folder)], pytest.fail)
    report = {"au": 0.9, "supply": 900.0, "demand": 1000.0, "together": 900.0}
    tracking.report(5, report | {"verdict": "contention"})
    tracking.report(5, report | {"verdict": "not distinguishable from the threshold: AU 44% to 110%"})
    # A label without figures: each value of a label is a series of its own.
    assert ("alexnet_stall_verdict", "not distinguishable from the threshold") in values(folder.path)
    tracking.report(5, report | {"verdict": "input-bound: decode"})
    found = values(folder.path)
    verdicts = {verdict: value for (name, verdict), value in found.items() if name == "alexnet_stall_verdict"}
    assert verdicts == {"input-bound: decode": 1} and found["alexnet_stall_demand_images_per_second", None] == 1000


def test_a_resumed_run_keeps_what_its_metrics_say(folder: RunFolder):
    folder.log({"step": 20, "loss": 6.9, "val_top1": 0.1})
    Prometheus(folder).log({"step": 40, "loss": 6.5})
    found = values(folder.path)
    assert found["alexnet_loss", None] == 6.5 and found["alexnet_validation_top1_ratio", None] == 0.1


def test_every_metric_is_in_the_document():
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
    assert [name for name, _ in METRICS.values() if f"`{name}`" not in text] == []


def test_train_writes_the_file_and_the_report_adds_its_verdict(end_to_end: Path, tmp_path: Path):
    run = ["--runs", tmp_path, "--run-name", "p", "--prometheus", "--steps", 3, *TINY]
    printed(tool("train", end_to_end / "shards" / "train", *run))
    found, last = values(tmp_path / "p"), metrics(tmp_path / "p")[-1]
    assert (
        found["alexnet_loss", None] == last["loss"] and found["alexnet_input_bound", None] == last["input_bound"] == 0
    )
    report = json.loads((tmp_path / "p" / "stall.json").read_text())
    assert found["alexnet_stall_verdict", verdict_kind(report["verdict"])] == 1
    assert found["alexnet_stall_au_ratio", None] == report["au"]
