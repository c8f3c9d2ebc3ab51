"""Run folders: no run is overwritten by mistake, and metrics survive crashes and full disks."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict
from pathlib import Path

import pytest

from model.recipe import SOURCE2012
from model.runs import RunFolder


def test_a_run_folder_is_not_used_twice_by_mistake(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    config = {"must_match": {"batch": 128, "recipe": asdict(SOURCE2012)}}
    folder.begin(config, resume=False)
    with pytest.raises(ValueError, match="this run exists already; add --resume, or choose another --run-name NAME"):
        folder.begin(config, resume=False)
    folder.begin(config, resume=True)
    with pytest.raises(ValueError, match="begun with batch 128, now 64; resume with the same"):
        folder.begin({"must_match": {**config["must_match"], "batch": 64}}, resume=True)


def test_metrics_of_steps_that_will_be_taken_again_are_dropped(tmp_path: Path):
    """A killed and resumed run then has the lines of an uninterrupted one. An incomplete last line is dropped, too."""
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.log({"step": step, "loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    folder.forget_after(20)
    assert [line["step"] for line in folder.metrics()] == [10, 20]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20]


def test_a_line_that_did_not_fit_on_the_disk_is_written_later(tmp_path: Path):
    """The file never holds part of it, and the order of lines stays."""
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
    with pytest.raises(OSError):
        folder.log({"step": 2})
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.log({"step": 3})
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]
