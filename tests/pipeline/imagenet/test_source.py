"""Sources: every picture of a layout is listed once, with its class, and its bytes are where the item says."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import scipy.io

from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR
from pipeline.imagenet.source import ItemReader, open_source
from tests.support.shard_fixtures import SAMPLE


def plain_tar_of_tars(path: Path) -> dict[str, tuple[str, bytes]]:
    """Twin: key -> (wnid, bytes), by really unpacking."""
    found = {}
    with tarfile.open(path) as outer:
        for class_tar in outer:
            file = outer.extractfile(class_tar)
            assert file is not None
            with tarfile.open(fileobj=io.BytesIO(file.read())) as inner:
                for member in inner:
                    content = inner.extractfile(member)
                    assert content is not None
                    found[Path(member.name).stem] = (Path(class_tar.name).stem, content.read())
    return found


def test_train_listing_equals_the_unpacked_tar(sample: Path):
    """Reading by offset gives the bytes and the class that unpacking gives, for every picture."""
    listing = open_source(sample).listing("train")
    with ItemReader() as reader:
        found = {i.key: (listing.classes[i.label].wnid, reader.read(i)) for i in listing.items}
    assert found == plain_tar_of_tars(sample / TRAIN_TAR)


def test_classes_are_sorted_by_wnid_and_only_leaves(sample: Path):
    classes = open_source(sample).listing("train").classes
    assert [c.wnid for c in classes] == sorted(c.wnid for c in classes)
    assert len(classes) == SAMPLE.classes
    assert all(c.words for c in classes)


def test_val_labels_follow_the_devkit(sample: Path):
    """Twin: line n of the ground truth is the ILSVRC2012_ID, not the label, of picture n; the devkit gives its wnid."""
    listing = open_source(sample).listing("val")
    with tarfile.open(sample / DEVKIT) as tar:
        files = {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isreg()}
    synsets = scipy.io.loadmat(io.BytesIO(files["meta.mat"]), struct_as_record=False, squeeze_me=True)["synsets"]
    wnid_of = {int(s.ILSVRC2012_ID): s.WNID for s in synsets}
    truth = files["ILSVRC2012_validation_ground_truth.txt"].decode().splitlines()
    expected = {f"ILSVRC2012_val_{n:08d}": wnid_of[int(line)] for n, line in enumerate(truth, start=1)}
    assert {i.key: listing.classes[i.label].wnid for i in listing.items} == expected
    assert [int(line) - 1 for line in truth] != [i.label for i in sorted(listing.items, key=lambda i: i.key)]
    assert Counter(i.label for i in listing.items) == dict.fromkeys(range(SAMPLE.classes), SAMPLE.val_images)


def folders_of(root: Path, names: dict[str, list[str]]) -> Path:
    for wnid, files in names.items():
        (root / "train" / wnid).mkdir(parents=True)
        for name in files:
            (root / "train" / wnid / name).write_bytes(f"{wnid}/{name}".encode())
    return root


def test_folders_are_listed_in_order_with_unique_keys(tmp_path: Path):
    """A name used in two classes gets its class before it; others keep theirs; what is no image is left out."""
    root = folders_of(tmp_path, {"n2": ["b.JPEG", "a.jpg"], "n1": ["b.JPEG", "notes.txt"]})
    listing = open_source(root).listing("train")
    assert [(i.key, i.label) for i in listing.items] == [("n1_b", 0), ("a", 1), ("n2_b", 1)]
    assert [c.wnid for c in listing.classes] == ["n1", "n2"]
    with ItemReader() as reader:
        assert [reader.read(i) for i in listing.items] == [b"n1/b.JPEG", b"n2/a.jpg", b"n2/b.JPEG"]


def test_keys_have_no_dots_or_spaces(tmp_path: Path):
    root = folders_of(tmp_path, {"n1": ["a b.c.JPEG"]})
    assert open_source(root).listing("train").items[0].key == "a_b_c"


def test_a_name_too_long_for_a_tar_is_refused(tmp_path: Path):
    root = folders_of(tmp_path, {"n1": ["x" * 91 + ".JPEG"]})
    with pytest.raises(ValueError, match="expected 1 to 90; rename it"):
        open_source(root).listing("train")


def test_the_fingerprint_changes_with_the_source(tmp_path: Path):
    root = folders_of(tmp_path, {"n1": ["a.JPEG", "b.JPEG"]})
    before = open_source(root).listing("train").record()
    (root / "train" / "n1" / "a.JPEG").write_bytes(b"longer than it was")
    assert open_source(root).listing("train").record() != before


def test_a_file_that_changes_after_the_listing_is_noticed(tmp_path: Path):
    root = folders_of(tmp_path, {"n1": ["a.JPEG"]})
    item = open_source(root).listing("train").items[0]
    item.file.write_bytes(b"another length altogether")
    with ItemReader() as reader, pytest.raises(ValueError, match="changed since it was listed"):
        reader.read(item)


def break_no_devkit(root: Path) -> str:
    (root / DEVKIT).unlink()
    return "missing; the class names come from it"


def break_devkit(root: Path) -> str:
    (root / DEVKIT).write_bytes(b"not a tar")
    return "not a tar"


def break_train_tar_cut(root: Path) -> str:
    data = (root / TRAIN_TAR).read_bytes()
    (root / TRAIN_TAR).write_bytes(data[: len(data) // 2])
    return "not a whole tar"


def break_train_tar_text(root: Path) -> str:
    (root / TRAIN_TAR).write_bytes(b"<html>not found</html>" * 100)
    return "not a whole tar"


def break_swapped(root: Path) -> str:
    shutil.copy(root / VAL_TAR, root / TRAIN_TAR)
    return "which is no class of the devkit"


@pytest.mark.parametrize(
    "broken", [break_no_devkit, break_devkit, break_train_tar_cut, break_train_tar_text, break_swapped]
)
def test_a_wrong_file_is_named(sample: Path, tmp_path: Path, broken):
    for name in (TRAIN_TAR, VAL_TAR, DEVKIT):
        shutil.copy(sample / name, tmp_path / name)
    message = broken(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(tmp_path).listing("train")
    assert str(tmp_path) in str(caught.value)


def test_a_val_tar_that_does_not_fit_the_devkit_is_refused(sample: Path, tmp_path: Path):
    shutil.copy(sample / DEVKIT, tmp_path / DEVKIT)
    with tarfile.open(sample / VAL_TAR) as whole, tarfile.open(tmp_path / VAL_TAR, "w") as part:
        for member in whole.getmembers()[:-1]:
            part.addfile(member, whole.extractfile(member))
    with pytest.raises(ValueError, match="19 images, but the devkit's ground truth has 20"):
        open_source(tmp_path).listing("val")


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "no such folder"), (["train"], "no ImageNet layout here"), (["train/n1"], "a class folder with no image")],
)
def test_empty_places_are_refused(tmp_path: Path, names: list[str], message: str):
    root = tmp_path / "root"
    for name in names:
        (root / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        open_source(root).listing("train")
