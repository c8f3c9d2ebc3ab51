"""A trained network for image files gives what evaluation gives for the files' samples in a shard set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.alexnet import AlexNet
from model.evaluation import class_probabilities
from model.shapes import NetSpec
from pipeline.imagenet.source import open_source
from pipeline.loader.augment import mean_of
from pipeline.loader.loader import view_loader
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.build import make_split
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.shards.settings import ResizeSettings
from pipeline.workers import IN_PROCESS, ignore
from tests.support.shard_fixtures import SHARD_SETTINGS, basis_of, drawn_jpeg
from tools.shared.classifier import Classifier
from tools.shared.image_files import stored_pixels

SIZES = [(640, 480), (300, 700), (256, 256), (90, 120), (1100, 1030)]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Photos in two class folders: JPEGs of several sizes, and a grey PNG."""
    files = []
    for number, size in enumerate(SIZES):
        path = tmp_path / "photos" / "train" / f"n0000000{number % 2}" / f"photo_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn_jpeg(number, *size))
        files.append(path)
    grey = files[0].with_name("grey.png")
    Image.open(files[1]).convert("L").save(grey)
    return [*files, grey]


def shard_set(photos: list[Path], out: Path, settings: ResizeSettings) -> ShardSet:
    source = open_source(photos[0].parents[2]).listing("train")
    make_split(source, out, replace(SHARD_SETTINGS, resize=settings), IN_PROCESS, 10, ignore)
    return open_shards(out / "train")


@pytest.mark.parametrize(
    ("views", "settings"),
    [(10, ResizeSettings()), (1, ResizeSettings(stored="square", quality=50, filter="area"))],
    ids=["default settings", "other settings"],
)
def test_a_file_is_classified_as_its_sample_in_a_shard_set(
    views: int, settings: ResizeSettings, photos: list[Path], tmp_path: Path
):
    shards = shard_set(photos, tmp_path / "shards", settings)
    basis, model = basis_of(shards), AlexNet(NetSpec(5, 0.05)).eval()
    classifier = Classifier(model, [["n", "name"]] * 5, mean_of(basis, "image"), settings)
    (batch,) = view_loader(shards, basis, LoaderSettings(batch=len(photos)), views)
    expected = class_probabilities(model, batch.images)
    by_name = {path.stem: path for path in photos}
    files = [next(by_name[name] for name in by_name if shards.key(n).endswith(name)) for n in batch.ids.tolist()]
    found = classifier.probabilities(files, views)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        hidden = classifier.features(files, "fc8")
        logits = model(torch.from_numpy(np.ascontiguousarray(batch.images[:, 2 if views == 10 else 0])))
    torch.testing.assert_close(hidden, logits, rtol=1e-3, atol=1e-3)  # view 3 of 10 is the centre
    if settings != ResizeSettings():  # the law above can fail
        wrong = Classifier(model, [["n", "name"]] * 5, mean_of(basis, "image"), ResizeSettings())
        assert (wrong.probabilities(files, views) - expected).abs().max() > 1e-6


def test_guesses_are_sorted_and_have_names(photos: list[Path]):
    model = AlexNet(NetSpec(3, 0.05))
    names = [["n0", "tench"], ["n1", "goldfish"], ["n2", "shark"]]
    classifier = Classifier(model, names, np.zeros((3, 224, 224), np.float32), ResizeSettings())
    probabilities = classifier.probabilities(photos)
    for row, guesses in zip(probabilities, classifier.classify(photos, top=2), strict=True):
        assert [guess.probability for guess in guesses] == row.sort(descending=True).values[:2].tolist()
        assert all([guess.wnid, guess.words] == names[guess.label] for guess in guesses)
    assert len(classifier.classify(photos[:1])[0]) == 3 and classifier.classify([]) == []


def test_features_of_fc7_are_what_fc8_reads(photos: list[Path]):
    model = AlexNet(NetSpec(3, 0.05))
    classifier = Classifier(model, [["n", "name"]] * 3, np.zeros((3, 224, 224), np.float32), ResizeSettings())
    features, logits = classifier.features(photos), classifier.features(photos, "fc8")
    fc8 = model.get_submodule("fc8")
    torch.testing.assert_close(features @ fc8.weight.T + fc8.bias, logits)
    assert features.shape == (len(photos), fc8.weight.shape[1]) and (features >= 0).all()
    assert classifier.features(photos, "conv5").shape[2:] == (6, 6)
    with pytest.raises(ValueError, match=r"layer 'fc9': this network has conv1, .* fc8"):
        classifier.features(photos, "fc9")


def test_wrong_files_and_views_are_named(photos: list[Path], tmp_path: Path):
    (tmp_path / "text.jpg").write_text("no image")
    cases = {
        tmp_path / "text.jpg": r"text.jpg: not an image in a known format .*; expected an image \(JPEG, PNG",
        tmp_path / "absent.jpg": r"absent.jpg: cannot be read \(No such file or directory\); expected an image",
        tmp_path: r"a folder, expected an image .*; name its files",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            stored_pixels(path, ResizeSettings())
    classifier = Classifier(
        AlexNet(NetSpec(3, 0.05)), [["n", "name"]] * 3, np.zeros((3, 224, 224), np.float32), ResizeSettings()
    )
    with pytest.raises(ValueError, match="3 views; choose 1"):
        classifier.classify(photos, views=3)
