"""No split, class or image is lost silently: odd folder names, files that cannot be read, classes that do not agree."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.imagenet.source import open_source
from tests.pipeline.imagenet.case_files import SHARK, TENCH, devkit, jpeg, tar_bytes, tree
from tests.pipeline.imagenet.layout_files import file_of, tar_of, write_parquet_file
from tests.pipeline.imagenet.test_cases_detection import CLASSES, SORTED_VAL, listed
from tools.make_shards import check_out

CLASS_TARS = [(f"{wnid}.tar", tar_bytes([(f"{wnid}_1.JPEG", jpeg())])) for wnid in (TENCH, SHARK)]
VAL_MEMBERS = [(f"ILSVRC2012_val_0000000{n}.JPEG", jpeg(n)) for n in (1, 2)]
METADATA = f"file_name,label\n0.jpg,{TENCH}\n1.jpg,{SHARK}\n"
Build = Callable[[Path], object]


def samples(*labels: object) -> list[tuple[str, bytes]]:
    """The members of a WebDataset tar with these labels."""
    return [
        (f"{n}.{kind}", jpeg(n) if kind == "jpg" else str(label).encode())
        for n, label in enumerate(labels)
        for kind in ("jpg", "cls")
    ]


def with_train(root: Path, *more: str) -> Path:
    return tree(root, *CLASSES, *more)


def renamed(old: str, new: str) -> Build:
    return lambda r: tree(r, *(n.replace(old, new) for n in (*CLASSES, *SORTED_VAL)))


def with_plain_tars(root: Path) -> None:
    tar_of(root / "train.tar", CLASS_TARS)
    tar_of(root / "imagenet_val.tar", VAL_MEMBERS)
    devkit(root, [SHARK, TENCH], [1, 2])


def with_link_above(root: Path) -> None:
    with_train(root, *SORTED_VAL)
    (root / f"train/{TENCH}/loop").symlink_to("../../train")


def with_parquet_folders(root: Path) -> None:
    for split in ("train", "val"):
        rows = [(f"{wnid}_{n}.JPEG", n, jpeg()) for n, wnid in enumerate((TENCH, SHARK))]
        write_parquet_file(root / f"{split}.parquet/part-0.PARQUET", rows, [])


BOTH: dict[str, Build] = {
    "a word in the name": lambda r: tree(
        r, *(n.replace("train", "train_resized").replace("val/", "resized-val/") for n in (*CLASSES, *SORTED_VAL))
    ),
    "val_sorted beside train": renamed("val/", "val_sorted/"),
    "eval": renamed("val/", "eval/"),
    "a space behind the name": renamed("train/", "train /"),
    "train.tar and a val tar": with_plain_tars,
    "a link to the split folder": with_link_above,
    "a full copy beside train": lambda r: with_train(r, *SORTED_VAL, f"train_full/{TENCH}/1.JPEG"),
    "labels in metadata.csv": lambda r: [
        tree(r, *(f"{split}/{n}.jpg" for split in ("train", "val") for n in range(2))),
        *(
            file_of(r / s / "metadata.csv", f"file_name,label\n0.jpg,{TENCH}\n1.jpg,{SHARK}\n".encode())
            for s in ("train", "val")
        ),
    ],
    "labels in metadata.jsonl": lambda r: [
        with_train(r, "val/0.jpg", "val/1.jpg"),
        file_of(
            r / "val/metadata.jsonl",
            "".join(f'{{"file_name": "{n}.jpg", "label": "{w}"}}\n' for n, w in enumerate((SHARK, TENCH))).encode(),
        ),
    ],
    "tars in numbered folders": lambda r: [
        tar_of(r / f"{split}/{n}/0.tar", samples(wnid))
        for split in ("train", "val")
        for n, wnid in enumerate((TENCH, SHARK))
    ],
    "parquet in folders of that name": with_parquet_folders,
}


@pytest.mark.parametrize("case", BOTH)
def test_both_splits_are_read(case: str, tmp_path: Path):
    """One image of each of two classes in train and in val."""
    BOTH[case](tmp_path / "src")
    found = listed(open_source(tmp_path / "src"))
    assert {split: sorted(wnids) for split, wnids in found.items()} == {"train": [TENCH, SHARK], "val": [TENCH, SHARK]}


def with_cut_tar(root: Path) -> None:
    path = tar_of(root / "ILSVRC2012_img_train.tar", CLASS_TARS)
    path.write_bytes(path.read_bytes()[: 512 + len(CLASS_TARS[0][1])])


def with_linked_class(root: Path) -> None:
    with_train(root, *SORTED_VAL)
    (root / "train/n02099601").symlink_to("/gone/n02099601")


def pointer(name: str) -> Build:
    return lambda r: file_of(r / name, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def with_classes(*names: str) -> Build:
    return lambda r: tree(r, *(f"{name}/{n}.jpg" for n, name in enumerate(names)))


def with_unnamed_tars(root: Path) -> None:
    tar_of(root / "00000.tar", samples(0))
    tar_of(root / "val/0.tar", samples(0))


REFUSED: dict[str, tuple[Build, str]] = {
    "misspelt val": (
        renamed("val/", "vaild/"),
        "src/vaild: class folders like those of train, but nothing is named",
    ),
    "test only": (renamed("val/", "test/"), "rename it to val if it is that split, or use --split train"),
    "two with the word": (
        lambda r: with_train(r, f"val_a/{TENCH}/1.JPEG", f"val_b/{TENCH}/1.JPEG"),
        "two folders for val; move one of them away",
    ),
    "FFCV val": (
        lambda r: [with_train(r), file_of(r / "val.beton", b"x")],
        "a folder of its class, or use --split train",
    ),
    "Arrow": (lambda r: file_of(r / "train/data-00000-of-00001.arrow", b"x"), "an Arrow file of Hugging Face's"),
    "TFRecord": (lambda r: file_of(r / "train-00000-of-01024", b"x"), "train-00000-of-01024: a TFRecord file"),
    "pieces": (lambda r: file_of(r / "train.tar.gz.partaa", b"x"), "cat train.tar.gz.part* > train.tar.gz"),
    "pieces of a zip": (lambda r: file_of(r / "imagenet.zip.001", b"x"), "cat imagenet.zip.* > imagenet.zip"),
    "an unfinished download": (
        lambda r: [tar_of(r / "train/0.tar", samples(0)), file_of(r / "train/1.tar.part", b"x")],
        "1.tar.part: a download that has not ended; finish it, or remove the file",
    ),
    "a packed class in the train tar": (
        lambda r: tar_of(r / "ILSVRC2012_img_train.tar", [CLASS_TARS[0], (f"{SHARK}.tar.gz", gzip.compress(b""))]),
        f"holds {SHARK}.tar.gz: packed",
    ),
    "a tar cut between members": (with_cut_tar, "no end mark behind its last member, so it may be cut off"),
    "a damaged devkit": (
        lambda r: [
            with_train(r),
            tar_of(r / "ILSVRC2012_img_val.tar", VAL_MEMBERS),
            file_of(r / "ILSVRC2012_devkit_t12.tar.gz", b"\x1f\x8bbroken"),
        ],
        "ILSVRC2012_devkit_t12.tar.gz: not a whole tar",
    ),
    "a class that is a link to nowhere": (with_linked_class, "train/n02099601: a link to /gone/n02099601, which does"),
    "an LFS pointer as a tar": (pointer("train-0.tar"), "only a Git LFS pointer; run: git lfs pull"),
    "an LFS pointer as parquet": (pointer("train-0.parquet"), "only a Git LFS pointer; run: git lfs pull"),
    "tars of which one is missing": (
        lambda r: [tar_of(r / f"train-{n:05d}-of-00003.tar", samples(n)) for n in (0, 2)],
        "2 files in its split, expected 3 (00001 is missing)",
    ),
    "tars without a split": (with_unnamed_tars, "00000.tar: no split in its name, and nothing else gives train"),
    "a tar of shards": (
        lambda r: tar_of(r / "train.tar", [("train-000000.tar", tar_bytes(samples(0, 1)))]),
        "train-000000.tar in it holds samples with labels, so it is no class; unpack the outer tar: tar -xf",
    ),
    "a tar of both splits": (
        lambda r: tar_of(r / "imagenette2.tar", [(f"x/{s}/{TENCH}/{s}.JPEG", jpeg()) for s in ("train", "val")]),
        "imagenette2.tar: holds folders of two splits, train and val; unpack it: tar -xf imagenette2.tar",
    ),
    "both splits in train": (
        lambda r: tree(r, *(f"train/{name}" for name in (*CLASSES, *SORTED_VAL))),
        "src/train: holds the folders of both splits, not the classes of train; move them up",
    ),
    "folders of class folders": (
        lambda r: tree(r, f"blur/1/{TENCH}/a.JPEG", f"blur/2/{TENCH}/a.JPEG"),
        "src/blur/1: holds class folders, so it is not a class of train",
    ),
    "numbers and names": (
        lambda r: [tar_of(r / "train/0.tar", samples(0, 1)), tar_of(r / "val/0.tar", samples("cat", "dog"))],
        "the splits have no class in common (0 and cat)",
    ),
    "another case": (with_classes("train/Cat", "val/cat"), "the splits have no class in common (Cat and cat)"),
    "a space for a line": (
        with_classes("train/sea lion", "train/cat", "val/sea_lion", "val/cat"),
        "class 'sea lion' is only in one split and 'sea_lion' only in the other",
    ),
    "a file as SOURCE": (lambda r: r.write_bytes(b"x"), "src: a file, expected the folder that holds it; use"),
    "a link to nowhere as SOURCE": (
        lambda r: r.symlink_to("/gone"),
        "src: a link to /gone, which does not exist; expected a folder with",
    ),
    "a table that is not UTF-8": (
        lambda r: [with_train(r), file_of(r / "words.txt", b"n01440764\tcaf\xe9\n")],
        "words.txt: not UTF-8 text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_a_split_or_a_class_is_refused(case: str, tmp_path: Path):
    """The message names the file and says what to do."""
    build, message = REFUSED[case]
    build(tmp_path / "src")
    with pytest.raises(ValueError, match=re.escape(message)):
        listed(open_source(tmp_path / "src"))


@pytest.mark.parametrize("out", ["", "train", f"train/{TENCH}/x", "train/sets"])
def test_out_in_the_source_is_refused(out: str, tmp_path: Path):
    """The next run would take it for a class, or the set for a split. Beside the split folders it is no harm."""
    root = with_train(tmp_path / "src", *SORTED_VAL)
    with pytest.raises(ValueError, match="in the source, where the next run would take it for a part of it"):
        check_out(root / out, root, open_source(root))
    check_out(root / "sets", root, open_source(root))


def test_out_beside_the_only_folder_of_the_source_is_refused(tmp_path: Path):
    """Otherwise the next run finds two folders; likewise among class folders."""
    root = with_train(tmp_path / "src/imagenet", *SORTED_VAL).parent
    classes = tree(tmp_path / "classes", "cat/1.jpg", "dog/2.jpg")
    for source in (root, classes):
        with pytest.raises(ValueError, match="choose another OUT"):
            check_out(source / "sets", source, open_source(source))
    with pytest.raises(ValueError, match="a file, expected a folder"):
        check_out(classes / "cat/1.jpg", classes, open_source(classes))


def test_the_plan_says_what_is_missing_or_renumbered(tmp_path: Path):
    """A gap in the numbers of tars, and labels that change because some are missing."""
    for n in (0, 1, 3):
        tar_of(tmp_path / f"train-{n}.tar", samples(3, 7))
    source = open_source(tmp_path)
    plan = source.plan([source.listing("train")])
    assert "3 tars (without 2) in" in plan[0]
    assert plan[1] == "  labels: 3 to 7 become 0 to 1; --class-list keeps those of a longer list"


def test_a_number_that_a_val_tar_holds_twice_is_unusable(tmp_path: Path):
    """One of the two images has another number, so its class would be wrong."""
    with_train(tmp_path)
    tar_of(tmp_path / "ILSVRC2012_img_val.tar", [VAL_MEMBERS[0], VAL_MEMBERS[0]])
    devkit(tmp_path, [SHARK, TENCH], [1, 2])
    listing = open_source(tmp_path).listing("val")
    assert (len(listing.items), len(listing.unusable)) == (1, 1)
    assert "holds the number of ILSVRC2012_val_00000001.JPEG twice" in listing.unusable[0].reason


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path):
    """A folder of images is a class, unless a split folder is beside it."""
    tree(tmp_path / "a", "bullet train/1.jpg", "car/1.jpg")
    assert [c.wnid for c in open_source(tmp_path / "a").listing("train").classes] == ["bullet train", "car"]


def test_an_unprintable_name_is_one_line(tmp_path: Path):
    """In the plan, characters that cannot be printed are escaped."""
    with_train(tmp_path, f"train/{TENCH}/a\nb.h5", "c\nd.txt")
    source = open_source(tmp_path)
    lines = source.plan([source.listing("train")])
    assert any(r"a\nb.h5" in line for line in lines) and any(r"c\nd.txt" in line for line in lines)
    assert not any("\n" in line for line in lines)
