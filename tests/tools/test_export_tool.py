"""tools/export.py: the file computes what the network computes, and holds the class names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.shard_fixtures import drawn_jpeg
from tests.support.tool_runs import printed, tool
from tools.shared import exported
from tools.shared.classifier import Classifier
from tools.shared.image_files import stored_pixels


@pytest.fixture
def checkpoint(end_to_end: Path) -> Path:
    return end_to_end / "a" / "checkpoints" / "step-000000010"


def test_the_exported_file_classifies_as_the_checkpoint(checkpoint: Path, tmp_path: Path):
    """A crop with pixel values 0-255 goes in, without any code of this project."""
    out = tmp_path / "new" / "net.pt2"
    assert "3 classes" in printed(tool("export", checkpoint, out))
    names = {"classes.json": ""}
    program = torch.export.load(out, extra_files=names).module()
    classifier = Classifier.load(checkpoint)
    assert json.loads(names["classes.json"]) == classifier.classes
    (tmp_path / "photo.jpg").write_bytes(drawn_jpeg(1, 256, 256))
    pixels = stored_pixels(tmp_path / "photo.jpg", classifier.resize)[16:240, 16:240]
    crops = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        found = program(crops).double().softmax(dim=1)
    torch.testing.assert_close(found, classifier.probabilities([tmp_path / "photo.jpg"]), rtol=1e-4, atol=1e-6)


def test_a_program_that_differs_is_not_written(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    classifier = Classifier.load(checkpoint)
    network = exported.CropClassifier(classifier.model, classifier.mean)

    class Wrong:
        """A program that returns other logits."""

        def module(self) -> object:
            def run(crops: Tensor) -> Tensor:
                return network(crops) + 0.5

            return run

    monkeypatch.setattr(torch.export, "load", lambda file: Wrong())
    monkeypatch.setattr(exported, "export", lambda network, extra_files: b"")
    assert exported.largest_difference(network, b"") == pytest.approx(0.5, rel=1e-4)
    done = tool("export", checkpoint, tmp_path / "net.pt2")
    assert "not written" in printed(done, code=1) and not list(tmp_path.iterdir())


def test_wrong_input_gets_one_line(checkpoint: Path, tmp_path: Path):
    for args, message in (
        ([tmp_path, tmp_path / "net.pt2"], "no checkpoint here"),
        ([checkpoint, tmp_path / "net.onnx"], "net.onnx: expected a name that ends with .pt2"),
    ):
        done = tool("export", *args)
        printed(done, code=2)
        assert message in done.stderr and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
