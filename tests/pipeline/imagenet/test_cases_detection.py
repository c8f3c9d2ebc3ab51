"""Detection on folders as people have them: each split is read from where it is, or refused before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.imagenet.source import Source, open_source
from tests.pipeline.imagenet.case_files import SHARK, TENCH, devkit, jpeg, make_shards, tar_bytes, tree
from tests.pipeline.imagenet.layout_files import tar_of

CLASSES = (f"train/{TENCH}/{TENCH}_1.JPEG", f"train/{SHARK}/{SHARK}_1.JPEG")
FLAT_VAL = ("val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG")
CLS_LOC = "ILSVRC/Data/CLS-LOC"
SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_0000000{n},{wnid} 1 2 3 4\n" for n, wnid in ((1, SHARK), (2, TENCH))
)
SORTED_VAL = (f"val/{SHARK}/1.JPEG", f"val/{TENCH}/2.JPEG")


def listed(source: Source) -> dict[str, list[str]]:
    """Split -> the class of each image, in the order of the listing."""
    listings = {split: source.listing(split) for split in source.splits()}
    assert len({listing.classes for listing in listings.values()}) == 1, "all splits have one list of classes"
    return {s: [found.classes[item.label].wnid for item in found.items] for s, found in listings.items()}


def with_annotations(root: Path) -> None:
    tree(root, *CLASSES, "val/images/val_0.JPEG", "val/images/val_1.JPEG")
    (root / "val/val_annotations.txt").write_text(f"val_0.JPEG\t{SHARK}\t0\t0\t9\t9\nval_1.JPEG\t{TENCH}\t0\t0\t9\t9\n")


def with_devkit(root: Path, packed: bool = True) -> None:
    tree(root, *CLASSES, *FLAT_VAL)
    devkit(root, [SHARK, TENCH], [1, 2], packed)


def with_val_tar(root: Path) -> None:
    tree(root, *CLASSES)
    tar_of(root / "val/ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_0000000{n}.JPEG", jpeg(n)) for n in (1, 2)])
    devkit(root, [SHARK, TENCH], [1, 2])


def with_solution(root: Path) -> None:
    tree(root, *(f"{CLS_LOC}/{name}" for name in (*CLASSES, *FLAT_VAL)), f"{CLS_LOC}/test/1.JPEG")
    (root / "LOC_val_solution.csv").write_text(SOLUTION)


def with_class_tars(root: Path) -> None:
    for wnid in (TENCH, SHARK):
        tar_of(root / f"train/{wnid}.tar", [(f"{wnid}_1.JPEG", jpeg()), ("._x.JPEG", b"x"), ("notes.txt", b"x")])
    tree(root, f"val/{SHARK}/1.JPEG", f"val/{TENCH}/2.JPEG")


def with_retarred_folders(root: Path) -> None:
    members = [(f"train/{wnid}/{wnid}_1.JPEG", jpeg()) for wnid in (TENCH, SHARK)]
    tar_of(root / "ILSVRC2012_img_train (1).tar", [*members, (f"train/{TENCH}/._{TENCH}_1.JPEG", b"x")])
    devkit(root, [SHARK, TENCH], [1, 2], packed=False)
    tar_of(root / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_0000000{n}.JPEG", jpeg(n)) for n in (1, 2)])


def with_tars_of_folders(root: Path) -> None:
    for split, wnids in (("train", (TENCH, SHARK)), ("val", (SHARK, TENCH))):
        tar_of(root / f"{split}.tar", [(f"{split}/{wnid}/image.1.JPEG", jpeg()) for wnid in wnids])


BOTH: dict[str, Callable[[Path], object]] = {
    "capitals": lambda r: tree(
        r, *(n.replace("train", "Train") for n in CLASSES), f"VAL/{SHARK}/1.JPEG", f"VAL/{TENCH}/2.JPEG"
    ),
    "validation": lambda r: tree(r, *CLASSES, f"validation/{SHARK}/1.JPEG", f"validation/{TENCH}/2.JPEG"),
    "one folder too many": lambda r: tree(r, *CLASSES, f"val/val/{SHARK}/1.JPEG", f"val/val/{TENCH}/2.JPEG"),
    "source too high": lambda r: tree(r, *(f"a/b/{n}" for n in (*CLASSES, *SORTED_VAL))),
    "parts": lambda r: tree(
        r, f"train.X1/{TENCH}/1.JPEG", f"train.X2/{SHARK}/2.JPEG", f"val.X/{SHARK}/3.JPEG", f"val.X/{TENCH}/4.JPEG"
    ),
    "tiny-imagenet": with_annotations,
    "flat val with a devkit": with_devkit,
    "flat val with an unpacked devkit": lambda r: with_devkit(r, packed=False),
    "flat val with wnids": lambda r: tree(r, *CLASSES, f"val/a_1_{SHARK}.JPEG", f"val/b_2_{TENCH}.JPEG"),
    "val tar in its folder": with_val_tar,
    "kaggle": with_solution,
    "kaggle, val sorted": lambda r: tree(
        r, *(f"{CLS_LOC}/{n}" for n in (*CLASSES, f"val/{SHARK}/1.JPEG", f"val/{TENCH}/2.JPEG"))
    ),
    "class tars": with_class_tars,
    "tars made of folders": with_retarred_folders,
    "a tar per split": with_tars_of_folders,
    "hidden": lambda r: tree(
        r, *CLASSES, *SORTED_VAL, "train/.cache/x.JPEG", "train/@eaDir/x.JPEG", "val/__MACOSX/x.JPEG"
    ),
    "leftover tars": lambda r: [
        tree(r, *CLASSES, f"val/{SHARK}/1.JPEG", f"val/{TENCH}/2.JPEG"),
        tar_of(r / "train/ILSVRC2012_img_train.tar", [(f"{TENCH}.tar", tar_bytes([("a.JPEG", jpeg())]))]),
        tar_of(r / f"train/{TENCH}.tar", [(f"{TENCH}_1.JPEG", jpeg())]),
        tar_of(r / "ILSVRC2012_img_val.tar", [("ILSVRC2012_val_00000001.JPEG", jpeg())]),
        tar_of(r / "val.tar", [("val/x/1.JPEG", jpeg())]),
    ],
}


@pytest.mark.parametrize("case", BOTH)
def test_both_splits_are_read_from_where_they_are(case: str, tmp_path: Path):
    """Each folder holds one image of two classes in train and in val; val's first image is of the second class."""
    BOTH[case](tmp_path / "src")
    found = listed(open_source(tmp_path / "src"))
    assert {split: sorted(wnids) for split, wnids in found.items()} == {"train": [TENCH, SHARK], "val": [TENCH, SHARK]}
    if "flat" in case or case in ("tiny-imagenet", "val tar in its folder", "kaggle"):
        assert found["val"] == [SHARK, TENCH]


def with_both(root: Path, *more: str) -> Path:
    return tree(root, *CLASSES, *more)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "flat val": (lambda r: with_both(r, *FLAT_VAL), "src/val: 2 images without class folders, and nothing says"),
    "empty val": (lambda r: with_both(r, "val/"), "src/val: empty; fill it, or remove it, or use --split train"),
    "val of text": (lambda r: with_both(r, "val/README.txt"), "src/val: no image in it or its folders (found README"),
    "packed val": (lambda r: with_both(r, "val.zip"), "src/val.zip: packed, .*unzip val.zip"),
    "packed shards": (lambda r: tree(r, "train/0.tar.gz"), "src/train/0.tar.gz: packed, .*gunzip 0.tar.gz"),
    "old Hub tars": (lambda r: tree(r, "data/train_images_0.tar.gz"), "data/train_images_0.tar.gz: packed"),
    "zip": (lambda r: tree(r, "imagenet-challenge.zip"), "imagenet-challenge.zip: packed"),
    "two val folders": (lambda r: with_both(r, "val/x/1.JPEG", "valid/x/1.JPEG"), "two folders for val; move one"),
    "half sorted val": (lambda r: with_both(r, f"val/{TENCH}/1.JPEG", FLAT_VAL[1]), "1 image beside class folders"),
    "half unpacked": (
        lambda r: [with_both(r), tar_of(r / "train/n02099601.tar", [("n02099601_1.JPEG", jpeg())])],
        "n02099601.tar: a class that is not unpacked, unlike others",
    ),
    "shards and folders": (
        lambda r: [with_both(r), tar_of(r / "train/0.tar", [("a.jpg", jpeg()), ("a.cls", b"0")])],
        "2 sources for train .*choose with --layout folders or --layout webdataset",
    ),
    "val tar without devkit": (
        lambda r: [with_both(r), tar_of(r / "ILSVRC2012_img_val.tar", [("ILSVRC2012_val_00000001.JPEG", jpeg())])],
        "ILSVRC2012_devkit_t12.tar.gz: missing",
    ),
    "one of several folders": (
        lambda r: tree(r, "notes/a.txt", f"imagenet/train/{TENCH}/1.JPEG"),
        "run make_shards.py with .*src/imagenet as SOURCE",
    ),
    "link to nowhere": (
        lambda r: [with_both(r), (r / "val").symlink_to("/gone/val")],
        "src/val: a link to a folder that does not exist; correct it, or remove it, or use --split train",
    ),
    "packed class": (lambda r: with_both(r, "train/n02099601.zip"), "n02099601.zip: a class that is not unpacked"),
    "one folder of folders": (
        lambda r: tree(r, "train/dog/small/1.JPEG", "train/dog/large/1.JPEG"),
        "2 folders in the only folder of train, so it is not clear which are the classes",
    ),
    "no class in common": (
        lambda r: [with_both(r), tar_of(r / "val-0.tar", [("a.jpg", jpeg()), ("a.cls", b"0")])],
        "the splits have no class in common",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_split_that_cannot_be_read_is_refused(case: str, tmp_path: Path):
    """The message says what was found and what to do."""
    build, message = REFUSED[case]
    build(tmp_path / "src")
    with pytest.raises(ValueError) as caught:
        listed(open_source(tmp_path / "src"))
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), str(caught.value)), str(caught.value)


def test_a_source_too_low_names_the_right_folder(tmp_path: Path):
    """The classes of a flat val are in a table above SOURCE."""
    with_solution(tmp_path / "src")
    for folder in (CLS_LOC, "ILSVRC"):
        with pytest.raises(ValueError, match=f"run make_shards.py with {tmp_path}/src as SOURCE"):
            open_source(tmp_path / "src" / folder)


def test_split_leaves_a_split_that_cannot_be_read(tmp_path: Path):
    """`--split train` needs no val."""
    with_both(tmp_path, *FLAT_VAL)
    assert open_source(tmp_path, split="train").splits() == ["train"]


def test_class_folders_without_a_split_are_train(tmp_path: Path):
    """Unless the folder itself is called val. The plan says that there is no split folder."""
    tree(tmp_path / "imagenet-r", f"{TENCH}/1.JPEG", f"{SHARK}/1.JPEG")
    source = open_source(tmp_path / "imagenet-r")
    assert listed(source) == {"train": [TENCH, SHARK]}
    assert "itself, which has no folder for a split" in source.plan([source.listing("train")])[0]
    (tmp_path / "imagenet-r").rename(tmp_path / "val")
    assert open_source(tmp_path / "val").splits() == ["val"]
    tree(tmp_path / "train", f"{TENCH}/1.JPEG")
    source = open_source(tmp_path / "val")
    assert "(train is beside it: give the folder above as SOURCE to read both)" in source.parts["val"].what


def test_a_folder_around_class_folders_is_no_class(tmp_path: Path):
    """As in imagenetv2-matched-frequency-format-val, unpacked in SOURCE, whose name has the split."""
    tree(tmp_path, *(f"imagenetv2-format-val/{n}/a{n}.jpeg" for n in (0, 2, 10)))
    assert [c.wnid for c in open_source(tmp_path).listing("val").classes] == ["0", "2", "10"]
    (tmp_path / "imagenetv2-format-val").rename(tmp_path / "set")
    assert [c.wnid for c in open_source(tmp_path).listing("train").classes] == ["0", "2", "10"]


def test_the_command_prints_the_plan_before_any_work(tmp_path: Path):
    """Parts, images, what is skipped, classes without images, and what is not used."""
    root = tree(
        tmp_path / "src", *CLASSES, f"val/{TENCH}/1.JPEG", "test/1.JPEG", f"train/{SHARK}/._1.JPEG", "notes.txt"
    )
    code, out, _ = make_shards(root, tmp_path / "out")
    assert code == 0
    assert out.splitlines()[:5] == [
        "train: 2 class folders in train, 2 images of 2 classes, layout folders",
        f"  skipped: 1 AppleDouble ({root}/train/{SHARK}/._1.JPEG)",
        "val: 1 class folder in val, 1 image of 2 classes, layout folders",
        f"  classes without images: 1 ({SHARK})",
        "not used: notes.txt, test",
    ]


def test_the_command_refuses_before_any_work(tmp_path: Path):
    """Exit 2, one line, and no folder for the shards."""
    code, out, error = make_shards(with_both(tmp_path / "src", *FLAT_VAL), tmp_path / "out")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert not (tmp_path / "out").exists()
