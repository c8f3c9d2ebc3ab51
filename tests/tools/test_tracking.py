"""Loggers of a run: what they receive, what TensorBoard stores, and a logger that fails."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.recipe import LayerLearningRates
from model.runs import RunFolder
from tests.support.tool_runs import TINY, metrics, printed, tool
from tools.shared.loggers import loggers_of
from tools.shared.tracking import Tracking, image_sheet, wait_share


class Recorder:
    """A logger of two methods, as docs/tracking.md shows."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.images: dict[str, np.ndarray] = {}

    def log(self, line: Mapping[str, Any]) -> None:
        """Keeps the line."""
        self.lines.append(dict(line))

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Keeps the image."""
        self.images[f"{name} {step}"] = pixels


class Full(Recorder):
    """A logger whose disk is full."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Fails."""
        raise OSError("no space")


def test_tensorboard_gets_what_json_lines_get_and_images(end_to_end: Path, tmp_path: Path):
    """The same losses at the same steps, also after a resume; learning rates; an example batch; kernels."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shards = end_to_end / "shards"
    command = [shards / "train", "--val", shards / "val", "--runs", tmp_path, "--run-name", "t", "--tensorboard"]
    for options in (["--steps", 3], ["--steps", 6, "--resume"]):
        printed(tool("train", *command, *TINY, "--stall-seconds", 0, *options))
    found = events.EventAccumulator(str(tmp_path / "t" / "tensorboard"))
    found.Reload()
    for name in ("loss", "wait_share", "val_top1"):
        lines = {line["step"]: line[name] for line in metrics(tmp_path / "t") if name in line}
        logged = {event.step: event.value for event in found.Scalars(name)}
        assert lines and logged == pytest.approx(lines, rel=1e-6)
    assert found.Scalars("lr/conv1.bias")[0].value == pytest.approx(0.02)
    assert {"batch", "conv1"} <= set(found.Tags()["images"])


def test_only_json_lines_get_no_images_and_no_learning_rates_by_layer():
    first, second = Recorder(), Recorder()
    tracking = Tracking([first, second], warn=pytest.fail)
    tracking.log({"step": 1, "loss": 2.0})
    tracking.learning_rates(1, {"conv1": LayerLearningRates(0.01, 0.02)})
    tracking.kernels(1, torch.randn(96, 3, 11, 11))
    assert first.lines == [{"step": 1, "loss": 2.0}] and not first.images
    assert second.lines[1] == {"step": 1, "lr/conv1.weight": 0.01, "lr/conv1.bias": 0.02}
    assert list(second.images) == ["conv1 1"] and second.images["conv1 1"].dtype == np.uint8


def test_a_logger_that_fails_gives_one_warning_and_stops_no_other():
    warnings: list[str] = []
    last = Recorder()
    tracking = Tracking([Full(), last], warnings.append)
    for step in range(3):
        tracking.log({"step": step})
    assert warnings == ["no space; training continues"] and len(last.lines) == 3


def test_other_ranks_send_nothing():
    Tracking([], pytest.fail).log({"step": 1})


def test_the_sheet_has_the_images_in_rows():
    images = np.arange(6, dtype=np.float32)[:, None, None, None] * np.ones((6, 3, 2, 2), np.float32)
    sheet = image_sheet(images, np.array([10.0, 20.0, 30.0]))
    assert sheet.shape == (4, 8, 3)
    assert sheet[0, 0].tolist() == [10, 20, 30] and sheet[0, 2].tolist() == [11, 21, 31]
    assert sheet[2, 2].tolist() == [15, 25, 35] and sheet[2, 4].tolist() == [0, 0, 0]


def test_the_wait_share_is_of_the_device_if_it_has_a_clock():
    line = {"images_per_s": 800.0, "wait_s": 0.08}  # a batch of 128 takes 0.16 s
    assert wait_share(line, 128) == pytest.approx(0.5)
    assert wait_share(line | {"device_gap_s": 0.016}, 128) == pytest.approx(0.1)


def test_a_logger_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ValueError, match=r"--prometheus: not installed; run: pip install -e '\.\[prometheus\]'"):
        loggers_of(RunFolder(tmp_path), 0, tensorboard=False, prometheus=True)
