"""The drawn ImageNet: its files are ILSVRC's, its pictures photograph-like, its classes not told by their colour."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import io as matlab

from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR
from pipeline.synthetic import dataset as sample
from pipeline.synthetic.dataset import ODDITIES, RECORD, SampleSettings, make_sample
from pipeline.synthetic.drawing import MAX_CLASSES, class_words, draw
from pipeline.workers import IN_PROCESS, workers_of
from tools import make_sample as tool

SETTINGS = SampleSettings(classes=3, train_images=16, val_images=4, min_side=64, max_side=96)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, SETTINGS, workers=IN_PROCESS, progress=lambda n: None)
    return folder


def members(tar: tarfile.TarFile) -> dict[str, bytes]:
    return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def train_files(out: Path) -> dict[str, bytes]:
    """Every training file by its name, from the tar of tars."""
    with tarfile.open(out / TRAIN_TAR) as outer:
        inner = members(outer)
    files: dict[str, bytes] = {}
    for name, content in inner.items():
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            of_class = members(tar)
        assert {file.split("_")[0] for file in of_class} == {name.removesuffix(".tar")}
        files |= of_class
    return files


def devkit(out: Path) -> tuple[np.ndarray, list[int]]:
    """`synsets` as its readers load it, and the ground truth."""
    with tarfile.open(out / DEVKIT) as tar:
        files = members(tar)
    data = "ILSVRC2012_devkit_t12/data/"
    synsets = matlab.loadmat(io.BytesIO(files[data + "meta.mat"]), squeeze_me=True)["synsets"]
    return synsets, [int(line) for line in files[data + "ILSVRC2012_validation_ground_truth.txt"].split()]


def sha256s(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


# --- files -------------------------------------------------------------------------------------------------------


def test_counts_and_names_are_those_of_ilsvrc(out: Path) -> None:
    """One tar per class with its share of n........_N.JPEG; validation numbered from 1; nothing else in the folder."""
    files = train_files(out)
    wnids = [entry["wnid"] for entry in json.loads((out / RECORD).read_text())["classes"]]
    assert Counter(name.split("_")[0] for name in files) == dict.fromkeys(wnids, SETTINGS.train_images)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)
    assert wnids == sorted(wnids)
    with tarfile.open(out / VAL_TAR) as tar:
        assert tar.getnames() == [f"ILSVRC2012_val_{n:08}.JPEG" for n in range(1, 13)]
    assert {path.name for path in out.iterdir()} == {TRAIN_TAR, VAL_TAR, DEVKIT, RECORD}


def test_devkit_has_the_real_ones_structure(out: Path) -> None:
    """Leaves come first and have ids from 1, in another order than their wnids; inner nodes name leaves as children."""
    synsets, ground_truth = devkit(out)
    assert synsets.dtype.names == (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    leaves, inner = synsets[synsets["num_children"] == 0], synsets[synsets["num_children"] > 0]
    assert list(leaves["ILSVRC2012_ID"]) == [1, 2, 3]
    assert list(leaves["WNID"]) != sorted(leaves["WNID"])
    assert all(leaves["num_train_images"] == SETTINGS.train_images)
    assert len(inner) == 1
    assert inner[0]["ILSVRC2012_ID"] > 3
    assert list(inner[0]["children"]) == [1, 2, 3]
    assert Counter(ground_truth) == dict.fromkeys([1, 2, 3], SETTINGS.val_images)
    assert ground_truth != sorted(ground_truth)


def test_ground_truth_names_the_class_that_was_drawn(out: Path) -> None:
    """By way of ILSVRC2012_ID and wnid, each validation file is a picture of the class that the ground truth says."""
    synsets, ground_truth = devkit(out)
    words = {row["ILSVRC2012_ID"]: row["words"] for row in synsets}
    with tarfile.open(out / VAL_TAR) as tar:
        files = list(members(tar).values())
    for label in range(SETTINGS.classes):
        drawn = {sample._encode(*sample._picture(SETTINGS, sample.VAL, label, i)) for i in range(SETTINGS.val_images)}
        said = {file for file, said in zip(files, ground_truth, strict=True) if words[said] == class_words(label)}
        assert said == drawn


def test_tars_hold_nothing_of_this_machine(out: Path) -> None:
    """Plain USTAR members with time 0 and owner 0, in outer and inner tars and in the devkit."""
    for name in (TRAIN_TAR, VAL_TAR, DEVKIT):
        with tarfile.open(out / name) as tar:
            for member in tar.getmembers():
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_same_settings_same_bytes_for_any_workers(out: Path, tmp_path: Path) -> None:
    """Two processes write what one wrote; another seed gives other pictures."""
    with workers_of(2, make_sample.__module__) as workers:
        make_sample(tmp_path / "two", SETTINGS, workers=workers, progress=lambda n: None)
    assert sha256s(tmp_path / "two") == sha256s(out)
    other = SampleSettings(3, 16, 4, 64, 96, seed=1)
    make_sample(tmp_path / "other", other, workers=IN_PROCESS, progress=lambda n: None)
    assert not set(sha256s(tmp_path / "other").values()) & set(sha256s(out).values())


def test_oddities_are_where_the_record_says(out: Path) -> None:
    """Each kind is there once; every file but the truncated one decodes, and all others are three-channel JPEGs."""
    oddities = json.loads((out / RECORD).read_text())["oddities"]
    assert set(oddities) == set(ODDITIES)
    odd_kinds = {key: kind for kind, key in oddities.items()}
    for name, content in train_files(out).items():
        kind = odd_kinds.pop(name.removesuffix(".JPEG"), None)
        image = Image.open(io.BytesIO(content))
        if kind == "truncated":
            assert b"\xff\xda" in content  # its scan has begun
            with pytest.raises(OSError, match="truncated"):
                image.load()
            continue
        image.load()
        assert image.format == ("PNG" if kind == "png" else "JPEG")
        assert image.mode == {"greyscale": "L", "cmyk": "CMYK"}.get(kind, "RGB")
        assert image.getexif().get(0x0112, 1) == (6 if kind == "exif_rotated" else 1)
    assert not odd_kinds


def test_exif_rotated_is_upright_once_turned(out: Path) -> None:
    """Turned as its EXIF asks, the rotated file shows the picture as drawn, up to JPEG's losses."""
    key = json.loads((out / RECORD).read_text())["oddities"]["exif_rotated"]
    wnid, number = key.split("_")
    label = sample.class_wnids(SETTINGS).index(wnid)
    drawn, _ = sample._picture(SETTINGS, sample.TRAIN, label, int(number) - 1)
    stored = Image.open(io.BytesIO(train_files(out)[f"{key}.JPEG"]))
    turned = ImageOps.exif_transpose(stored)
    assert stored.size == drawn.size[::-1]
    assert np.abs(np.asarray(turned, int) - np.asarray(drawn, int)).mean() < 12


def test_made_already_is_left_alone(out: Path) -> None:
    """A second call with the same settings draws nothing and writes nothing."""
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    drawn: list[int] = []
    make_sample(out, SETTINGS, workers=IN_PROCESS, progress=drawn.append)
    assert drawn == []
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_settings_are_refused(out: Path) -> None:
    """A sample of other settings is not overwritten."""
    before = sha256s(out)
    with pytest.raises(ValueError, match="not made with these settings; name another folder"):
        make_sample(out, SampleSettings(3, 16, 4, 64, 96, seed=1), workers=IN_PROCESS, progress=lambda n: None)
    assert sha256s(out) == before


@pytest.mark.parametrize("name", [TRAIN_TAR, VAL_TAR, DEVKIT, RECORD])
def test_somebody_elses_files_are_refused(tmp_path: Path, name: str) -> None:
    """One file of a real ImageNet, or a record of something else, is enough to stop, and stays as it is."""
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=name):
        make_sample(tmp_path, SETTINGS, workers=IN_PROCESS, progress=lambda n: None)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"{}"]


def test_a_replaced_tar_is_not_taken_for_ours(out: Path, tmp_path: Path) -> None:
    """The record alone does not vouch for tars of another size."""
    (tmp_path / RECORD).write_bytes((out / RECORD).read_bytes())
    for name in (TRAIN_TAR, VAL_TAR, DEVKIT):
        (tmp_path / name).write_bytes(b"real")
    with pytest.raises(ValueError, match="move them away"):
        make_sample(tmp_path, SETTINGS, workers=IN_PROCESS, progress=lambda n: None)


def test_an_interrupted_run_leaves_no_final_name_and_can_be_repeated(out: Path, tmp_path: Path) -> None:
    """Stopped half-way there is no file that a reader would open; the next run makes the same set."""

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path, SETTINGS, workers=IN_PROCESS, progress=stop)
    assert not any((tmp_path / name).exists() for name in (TRAIN_TAR, VAL_TAR, DEVKIT, RECORD))
    drawn: list[int] = []
    make_sample(tmp_path, SETTINGS, workers=IN_PROCESS, progress=drawn.append)
    assert sum(drawn) == SETTINGS.images
    assert sha256s(tmp_path) == sha256s(out)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": 1}, "classes is 1"),
        ({"classes": MAX_CLASSES + 1}, "choose 2 to"),
        ({"classes": 2, "train_images": 3}, "at least 8 train images"),
        ({"val_images": 0}, "1 val image"),
        ({"min_side": 31}, "32 <= min_side"),
        ({"min_side": 200, "max_side": 199}, "min_side <= max_side"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, int], message: str) -> None:
    """Wrong numbers are refused on construction, by name."""
    with pytest.raises(ValueError, match=message):
        SampleSettings(**wrong)


def test_tool_draws_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command makes set and contact sheet; run again it says that the set is there."""
    sheet = tmp_path / "docs" / "sheet.png"
    arguments = [str(tmp_path / "out"), "--classes", "2", "--train", "4", "--val", "1", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["make_sample.py", *arguments, "--contact-sheet", str(sheet)])
    assert tool.main() == 0
    with Image.open(sheet) as picture:
        assert picture.height == 2 * 112
    assert "10 images of 2 classes" in capsys.readouterr().out
    assert tool.main() == 0
    assert "already holds this sample" in capsys.readouterr().out


# --- pictures ----------------------------------------------------------------------------------------------------

TRAIN_PER_CLASS, VAL_PER_CLASS = 40, 15


@pytest.fixture(scope="module")
def pictures() -> list[list[NDArray[np.uint8]]]:
    """Pictures by class, small ones: what is tested does not depend on their size."""
    return [
        [draw(label, 64, 128, np.random.default_rng([5, label, n])) for n in range(TRAIN_PER_CLASS + VAL_PER_CLASS)]
        for label in range(12)
    ]


def test_no_two_classes_are_the_same_thing() -> None:
    """Every class has words of its own, and within the first twelve neither shape nor pattern repeats."""
    words = [class_words(label).split(",")[0] for label in range(MAX_CLASSES)]
    assert len(set(words)) == MAX_CLASSES
    patterns, shapes = zip(*(name.split() for name in words[:12]), strict=True)
    assert len(set(patterns)) == len(set(shapes)) == 12


def test_pictures_are_functions_of_their_generator(pictures: list[list[NDArray[np.uint8]]]) -> None:
    """The same generator state gives the same picture; sides stay in range, in both orientations."""
    np.testing.assert_array_equal(pictures[7][3], draw(7, 64, 128, np.random.default_rng([5, 7, 3])))
    shapes = [picture.shape for of_class in pictures for picture in of_class]
    assert {shape[2] for shape in shapes} == {3}
    assert all(64 <= side <= 128 for shape in shapes for side in shape[:2])
    wide = sum(width > height for height, width, _ in shapes) / len(shapes)
    assert 0.35 < wide < 0.65


def test_pixels_are_distributed_like_a_photographs(pictures: list[list[NDArray[np.uint8]]]) -> None:
    """Channels rise and fall together, the first eigenvector is near grey, and neighbouring pixels are alike."""
    pixels = np.concatenate([picture.reshape(-1, 3) for of_class in pictures for picture in of_class]).astype(float)
    covariance = np.cov(pixels.T)
    assert np.all(covariance > 0)
    assert np.all((np.sqrt(np.diag(covariance)) > 55) & (np.sqrt(np.diag(covariance)) < 80))
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    assert abs(eigenvectors[:, -1] @ np.full(3, 3**-0.5)) > 0.98
    assert eigenvalues[-1] > 5 * eigenvalues[-2]
    greens = [picture[..., 1].astype(float) for of_class in pictures for picture in of_class]
    assert np.mean([np.corrcoef(g[:, 1:].ravel(), g[:, :-1].ravel())[0, 1] for g in greens]) > 0.8


def accuracy_on_mean_colour(mean_colours: NDArray[np.float64]) -> float:
    """Top-1 on the last VAL_PER_CLASS of each class of (classes, pictures, 3), by ridge regression on the others."""
    train, val = mean_colours[:, :TRAIN_PER_CLASS].reshape(-1, 3), mean_colours[:, TRAIN_PER_CLASS:].reshape(-1, 3)
    centre, spread = train.mean(axis=0), train.std(axis=0)
    train, val = (np.column_stack([(x - centre) / spread, np.ones(len(x))]) for x in (train, val))
    targets = np.repeat(np.eye(len(mean_colours)), TRAIN_PER_CLASS, axis=0)
    weights = np.linalg.solve(train.T @ train + np.eye(4), train.T @ targets)
    labels = np.repeat(np.arange(len(mean_colours)), VAL_PER_CLASS)
    return float(np.mean(np.argmax(val @ weights, axis=1) == labels))


def test_mean_colour_does_not_give_classes_away(pictures: list[list[NDArray[np.uint8]]]) -> None:
    """A linear classifier on the mean colour stays near chance; it would not if classes differed in colour."""
    mean_colours = np.array([[picture.mean(axis=(0, 1)) for picture in of_class] for of_class in pictures])
    assert accuracy_on_mean_colour(mean_colours) < 0.25
    angles = np.arange(12) * 2 * np.pi / 12
    tints = 150 * np.stack([np.cos(angles), np.sin(angles), np.zeros(12)], axis=1)
    assert accuracy_on_mean_colour(mean_colours + tints[:, None, :]) > 0.5
