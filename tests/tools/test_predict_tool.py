"""tools/predict.py on image files, with the checkpoint of a tiny run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.checkpoint import load_data
from pipeline.shards.reader import open_shards
from tests.support.shard_fixtures import drawn_jpeg
from tests.support.tool_runs import printed, tool
from tools.shared.checkpoint_data import resize_settings
from tools.shared.classifier import Classifier


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    for number in range(3):
        (tmp_path / f"photo_{number}.jpg").write_bytes(drawn_jpeg(number, 400 + number, 300))
    return sorted(tmp_path.glob("photo_*"))


@pytest.fixture
def checkpoint(end_to_end: Path) -> Path:
    return end_to_end / "a" / "checkpoints" / "step-000000010"


def test_the_checkpoint_holds_names_and_resize_settings(end_to_end: Path, checkpoint: Path):
    manifest = open_shards(end_to_end / "shards" / "train").manifest
    assert load_data(checkpoint).resize.items() <= manifest.settings.items()
    assert asdict(resize_settings(checkpoint)) == load_data(checkpoint).resize
    assert load_data(checkpoint).classes == [[one.wnid, one.words] for one in manifest.classes]


def test_the_most_probable_classes_are_printed_with_names(checkpoint: Path, photos: list[Path], tmp_path: Path):
    out = tmp_path / "p.json"
    options = ["--checkpoint", checkpoint, "--views", 10, "--top", 2, "--device", "cpu", "--json", out]
    lines = printed(tool("predict", *photos, *options)).splitlines()
    guesses = Classifier.load(checkpoint).classify(photos, views=10, top=2)
    assert len(lines) == 3 * len(photos) and lines[::3] == [str(path) for path in photos]
    found = json.loads(out.read_text())["images"]
    for path, expected in zip(photos, guesses, strict=True):
        assert [guess["label"] for guess in found[str(path)]] == [guess.label for guess in expected]
        line = lines[lines.index(str(path)) + 1]
        assert expected[0].wnid in line and expected[0].words in line and f"{expected[0].probability:.2%}" in line


def test_features_are_written_as_npy(checkpoint: Path, photos: list[Path], tmp_path: Path):
    options = ["--checkpoint", checkpoint, "--features", "fc7", "--out", tmp_path / "new" / "f.npy", "--device", "cpu"]
    assert "fc7 of 3 images" in printed(tool("predict", *photos, *options))
    features = np.load(tmp_path / "new" / "f.npy")
    expected = Classifier.load(checkpoint).features(photos, "fc7").numpy()
    assert features.dtype == np.float32 and np.array_equal(features, expected)


def test_exif_is_applied_only_on_request(checkpoint: Path, photos: list[Path], tmp_path: Path):
    """As in training by default. A photo that its EXIF turns is classified as the turned photo if asked for."""
    exif, turned = Image.Exif(), tmp_path / "turned.png"
    exif[0x0112] = 3  # by 180 degrees
    with Image.open(photos[0]) as image:
        image.save(tmp_path / "marked.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_180).save(turned)
        image.save(tmp_path / "plain.png")
    out = tmp_path / "p.json"
    files = [tmp_path / "marked.png", tmp_path / "plain.png", turned]

    def probabilities(*options: str) -> list[list[float]]:
        printed(tool("predict", *files, "--checkpoint", checkpoint, "--device", "cpu", "--json", out, *options))
        found = json.loads(out.read_text())["images"]
        return [[guess["probability"] for guess in found[str(path)]] for path in files]

    marked, plain, _ = probabilities()
    assert marked == plain
    marked, plain, other = probabilities("--apply-exif")
    assert marked == pytest.approx(other) and marked != plain


def test_wrong_input_writes_nothing(checkpoint: Path, photos: list[Path], tmp_path: Path):
    (tmp_path / "text.jpg").write_text("no image")
    given = ["--checkpoint", checkpoint, "--device", "cpu"]
    cases = [
        ([tmp_path / "no.jpg", *given], r"no.jpg: no such file; expected image files"),
        ([tmp_path / "text.jpg", *given, "--json", tmp_path / "p.json"], "text.jpg: not an image in a known format"),
        ([*photos, "--checkpoint", tmp_path], "no checkpoint here"),
        ([*photos, *given, "--features", "fc7"], "--features and --out belong together"),
        ([*photos, *given, "--features", "fc9", "--out", tmp_path / "f.npy"], "layer 'fc9': this network has conv1"),
        ([*photos, *given, "--features", "fc7", "--out", tmp_path / "f.txt"], "ends with .npy"),
        ([*photos, *given, "--features", "fc7", "--out", tmp_path / "f.npy", "--views", 10], "omit --views"),
        ([*photos, *given, "--top", 0], "--top 0: expected at least 1"),
    ]
    before = sorted(tmp_path.iterdir())
    for args, message in cases:
        done = tool("predict", *args)
        printed(done, code=2)
        errors = [line for line in done.stderr.splitlines() if line.startswith("predict.py: ")]
        assert len(errors) == 1 and message in errors[0], done.stderr
    assert sorted(tmp_path.iterdir()) == before
