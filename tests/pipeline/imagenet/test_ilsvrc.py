"""Layout `ilsvrc`: every image of the packed tars is listed once, with its class and byte range."""

from __future__ import annotations

import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR
from pipeline.imagenet.source import open_source
from tests.pipeline.imagenet.layout_files import content, error_of, unpacked_train, val_ilsvrc_ids, wnid_of_ilsvrc_id
from tests.support.shard_fixtures import SAMPLE


def test_train_listing_equals_the_unpacked_tar(sample: Path):
    """Reading by offset gives the bytes and the class that unpacking gives, for every image."""
    assert content(open_source(sample).listing("train")) == unpacked_train(sample / TRAIN_TAR)


def test_classes_are_sorted_by_wnid_and_only_leaves(sample: Path):
    """The devkit lists inner nodes of the WordNet tree, too; they are not classes."""
    classes = open_source(sample).listing("train").classes
    assert [c.wnid for c in classes] == sorted(c.wnid for c in classes)
    assert len(classes) == SAMPLE.classes
    assert all(c.words for c in classes)


def test_val_labels_follow_the_devkit(sample: Path):
    """Line n of the ground truth is the ILSVRC2012_ID of image n, which is not its label; the devkit gives its wnid."""
    listing = open_source(sample).listing("val")
    wnid_of, ground_truth = wnid_of_ilsvrc_id(sample), val_ilsvrc_ids(sample)
    expected = {f"ILSVRC2012_val_{n:08d}": wnid_of[ilsvrc_id] for n, ilsvrc_id in enumerate(ground_truth, start=1)}
    assert {i.key: listing.classes[i.label].wnid for i in listing.items} == expected
    assert [ilsvrc_id - 1 for ilsvrc_id in ground_truth] != [
        i.label for i in sorted(listing.items, key=lambda i: i.key)
    ]
    assert Counter(i.label for i in listing.items) == dict.fromkeys(range(SAMPLE.classes), SAMPLE.val_images)


def break_no_devkit(root: Path) -> str:
    (root / DEVKIT).unlink()
    return "missing; it has the class of each image in ILSVRC2012_img_val.tar; put it beside the image tars"


def break_devkit(root: Path) -> str:
    (root / DEVKIT).write_bytes(b"not a tar")
    return "ILSVRC2012_devkit_t12.tar.gz: not a whole tar; download it again"


def break_train_tar_cut(root: Path) -> str:
    data = (root / TRAIN_TAR).read_bytes()
    (root / TRAIN_TAR).write_bytes(data[: len(data) // 2])
    return "not a whole tar"


def break_train_tar_text(root: Path) -> str:
    (root / TRAIN_TAR).write_bytes(b"<html>not found</html>" * 100)
    return "not a whole tar"


def break_swapped(root: Path) -> str:
    shutil.copy(root / VAL_TAR, root / TRAIN_TAR)
    return "has no wnid in its path; expected class tars or class folders"


@pytest.mark.parametrize(
    "broken", [break_no_devkit, break_devkit, break_train_tar_cut, break_train_tar_text, break_swapped]
)
def test_a_wrong_file_is_named(sample: Path, tmp_path: Path, broken: Callable[[Path], str]):
    """Each `broken` damages one file and returns the expected message."""
    for name in (TRAIN_TAR, VAL_TAR, DEVKIT):
        shutil.copy(sample / name, tmp_path / name)
    assert broken(tmp_path) in error_of(tmp_path)


def test_a_val_tar_that_does_not_fit_the_devkit_is_an_error(sample: Path, tmp_path: Path):
    """One image fewer than the ground truth has."""
    shutil.copy(sample / DEVKIT, tmp_path / DEVKIT)
    with tarfile.open(sample / VAL_TAR) as whole, tarfile.open(tmp_path / VAL_TAR, "w") as part:
        for member in whole.getmembers()[:-1]:
            part.addfile(member, whole.extractfile(member))
    with pytest.raises(ValueError, match="19 images, but the devkit's ground truth has 20"):
        open_source(tmp_path).listing("val")
