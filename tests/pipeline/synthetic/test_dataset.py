"""The synthetic dataset: its files have ILSVRC's formats, and the same settings give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import io as matlab

from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR
from pipeline.synthetic import dataset
from pipeline.synthetic.dataset import IRREGULAR_FILES, RECORD_NAME, make_sample
from pipeline.synthetic.drawing import class_words
from pipeline.synthetic.settings import MAX_CLASSES, SampleSettings
from pipeline.workers import IN_PROCESS, ignore, workers_of
from tools import make_sample as tool

ROOT = Path(__file__).parents[3]
SETTINGS = SampleSettings(classes=3, train_images=16, val_images=4, min_side=64, max_side=96)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, SETTINGS, workers=IN_PROCESS, progress=ignore)
    return folder


def members(tar: tarfile.TarFile) -> dict[str, bytes]:
    return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def train_files(out: Path) -> dict[str, bytes]:
    """File name -> content of every training file."""
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
    """`synsets` of meta.mat, and the ground truth."""
    with tarfile.open(out / DEVKIT) as tar:
        files = members(tar)
    data = "ILSVRC2012_devkit_t12/data/"
    synsets = matlab.loadmat(io.BytesIO(files[data + "meta.mat"]), squeeze_me=True)["synsets"]
    return synsets, [int(line) for line in files[data + "ILSVRC2012_validation_ground_truth.txt"].split()]


def sha256s(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def test_counts_and_names_are_those_of_ilsvrc(out: Path) -> None:
    """One tar per class, with members <wnid>_<n>.JPEG; validation images numbered from 1; no other file."""
    files = train_files(out)
    wnids = [entry["wnid"] for entry in json.loads((out / RECORD_NAME).read_text())["classes"]]
    assert Counter(name.split("_")[0] for name in files) == dict.fromkeys(wnids, SETTINGS.train_images)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)
    assert wnids == sorted(wnids)
    with tarfile.open(out / VAL_TAR) as tar:
        assert tar.getnames() == [f"ILSVRC2012_val_{n:08}.JPEG" for n in range(1, 13)]
    assert {path.name for path in out.iterdir()} == {TRAIN_TAR, VAL_TAR, DEVKIT, RECORD_NAME}


def test_the_devkit_is_structured_like_the_real_one(out: Path) -> None:
    """Leaves come first, with ids from 1 in another order than their wnids; an inner node has them as children."""
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
    """Ground truth and synsets together give the class for which each validation image was drawn."""
    synsets, ground_truth = devkit(out)
    words = {row["ILSVRC2012_ID"]: row["words"] for row in synsets}
    with tarfile.open(out / VAL_TAR) as tar:
        files = list(members(tar).values())
    for label in range(SETTINGS.classes):
        drawn = {
            dataset._encode(*dataset._image(SETTINGS, dataset.SEED_VAL, label, i)) for i in range(SETTINGS.val_images)
        }
        said = {file for file, said in zip(files, ground_truth, strict=True) if words[said] == class_words(label)}
        assert said == drawn


def test_tars_hold_no_times_and_owners(out: Path) -> None:
    """Members have time 0 and owner 0, so the same settings give the same bytes anywhere."""
    for name in (TRAIN_TAR, VAL_TAR, DEVKIT):
        with tarfile.open(out / name) as tar:
            for member in tar.getmembers():
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_same_settings_same_bytes_for_any_workers(out: Path, tmp_path: Path) -> None:
    """Two processes write the same files as one; another seed gives other files."""
    with workers_of(2, make_sample.__module__) as workers:
        make_sample(tmp_path / "two", SETTINGS, workers=workers, progress=ignore)
    assert sha256s(tmp_path / "two") == sha256s(out)
    other = SampleSettings(3, 16, 4, 64, 96, seed=1)
    make_sample(tmp_path / "other", other, workers=IN_PROCESS, progress=ignore)
    assert not set(sha256s(tmp_path / "other").values()) & set(sha256s(out).values())


def test_irregular_files_are_where_the_record_says(out: Path) -> None:
    """There is one of each kind. All files but the truncated one decode, and all regular files are RGB JPEGs."""
    oddities = json.loads((out / RECORD_NAME).read_text())["oddities"]
    assert set(oddities) == set(IRREGULAR_FILES)
    kind_of_key = {key: kind for kind, key in oddities.items()}
    for name, content in train_files(out).items():
        kind = kind_of_key.pop(name.removesuffix(".JPEG"), None)
        image = Image.open(io.BytesIO(content))
        if kind == "truncated":
            assert b"\xff\xda" in content  # the JPEG header is complete and the scan has begun
            with pytest.raises(OSError, match="truncated"):
                image.load()
            continue
        image.load()
        assert image.format == ("PNG" if kind == "png" else "JPEG")
        assert image.mode == {"greyscale": "L", "cmyk": "CMYK"}.get(kind, "RGB")
        assert image.getexif().get(0x0112, 1) == (6 if kind == "exif_rotated" else 1)
    assert not kind_of_key


def test_the_exif_rotated_file_is_upright_after_rotation(out: Path) -> None:
    """Rotated as its EXIF orientation says, it is the image as drawn, up to JPEG's losses."""
    key = json.loads((out / RECORD_NAME).read_text())["oddities"]["exif_rotated"]
    wnid, number = key.split("_")
    label = dataset.class_wnids(SETTINGS).index(wnid)
    drawn, _ = dataset._image(SETTINGS, dataset.SEED_TRAIN, label, int(number) - 1)
    stored = Image.open(io.BytesIO(train_files(out)[f"{key}.JPEG"]))
    turned = ImageOps.exif_transpose(stored)
    assert stored.size == drawn.size[::-1]
    assert np.abs(np.asarray(turned, int) - np.asarray(drawn, int)).mean() < 12


def test_an_existing_dataset_is_left_unchanged(out: Path) -> None:
    """A second call with the same settings draws nothing and writes nothing."""
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    drawn: list[int] = []
    make_sample(out, SETTINGS, workers=IN_PROCESS, progress=drawn.append)
    assert drawn == []
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_dataset_with_other_settings_is_not_overwritten(out: Path) -> None:
    """It is an error that says what to do."""
    before = sha256s(out)
    with pytest.raises(ValueError, match="not made with these settings; name another folder"):
        make_sample(out, SampleSettings(3, 16, 4, 64, 96, seed=1), workers=IN_PROCESS, progress=ignore)
    assert sha256s(out) == before


@pytest.mark.parametrize("name", [TRAIN_TAR, VAL_TAR, DEVKIT, RECORD_NAME])
def test_files_from_elsewhere_are_not_overwritten(tmp_path: Path, name: str) -> None:
    """One file of the real ImageNet is enough for an error, and it keeps its content."""
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=name):
        make_sample(tmp_path, SETTINGS, workers=IN_PROCESS, progress=ignore)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"{}"]


def test_a_replaced_tar_is_an_error(out: Path, tmp_path: Path) -> None:
    """The record does not count if the tars have other sizes."""
    (tmp_path / RECORD_NAME).write_bytes((out / RECORD_NAME).read_bytes())
    for name in (TRAIN_TAR, VAL_TAR, DEVKIT):
        (tmp_path / name).write_bytes(b"real")
    with pytest.raises(ValueError, match="move them away"):
        make_sample(tmp_path, SETTINGS, workers=IN_PROCESS, progress=ignore)


def test_an_interrupted_run_leaves_no_final_name_and_can_be_repeated(out: Path, tmp_path: Path) -> None:
    """After an interruption no file is left; the next run makes the same dataset."""

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path, SETTINGS, workers=IN_PROCESS, progress=stop)
    assert not list(tmp_path.iterdir())
    drawn: list[int] = []
    make_sample(tmp_path, SETTINGS, workers=IN_PROCESS, progress=drawn.append)
    assert sum(drawn) == SETTINGS.images
    assert sha256s(tmp_path) == sha256s(out)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": 1}, "1 classes; choose 2 to"),
        ({"classes": MAX_CLASSES + 1}, "choose 2 to"),
        ({"classes": 2, "train_images": 3}, "at least 8 train images"),
        ({"val_images": 0}, "1 val image"),
        ({"min_side": 31}, "32 <= smallest"),
        ({"min_side": 200, "max_side": 199}, "smallest <= largest"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_impossible_settings_are_an_error(wrong: dict[str, int], message: str) -> None:
    """The message names the wrong number and the allowed range."""
    with pytest.raises(ValueError, match=message):
        SampleSettings(**wrong)


def test_the_tool_draws_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command makes dataset and contact sheet. A second run says that the dataset is there."""
    sheet = tmp_path / "docs" / "sheet.png"
    arguments = [str(tmp_path / "out"), "--classes", "2", "--train", "4", "--val", "1", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["make_sample.py", *arguments, "--contact-sheet", str(sheet)])
    assert tool.main() == 0
    with Image.open(sheet) as image:
        assert image.height == 2 * 112
    assert "10 images of 2 classes" in capsys.readouterr().out
    assert tool.main() == 0
    assert "already holds this sample" in capsys.readouterr().out


def test_the_tool_checks_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the option, and nothing is written."""
    monkeypatch.setattr(sys, "argv", ["make_sample.py", str(tmp_path / "out"), "--workers", "0"])
    with pytest.raises(ValueError, match="--workers 0, expected at least 1"):
        tool.main()
    assert not (tmp_path / "out").exists()


def test_help_of_the_tool_needs_no_heavy_import() -> None:
    """Importing the tool, as `--help` does, imports no library that takes long to load."""
    heavy = {"numpy", "scipy", "PIL", "torch", "nvidia"}
    code = f"import sys, tools.make_sample; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
