"""TODO-DOC pipeline.imagenet.ilsvrc (from pipeline.tar_layouts)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

import scipy.io

from pipeline.imagenet.listing import SPLITS, ClassName, Item, Items, Listing, key_of
from pipeline.imagenet.tar_members import open_tar, read_members

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class IlsvrcTars:
    """The three ILSVRC2012 files in folder `root`."""

    root: Path
    layout: str = "ilsvrc"
    expected: str = f"{TRAIN_TAR} or {VAL_TAR} with {DEVKIT}"

    def splits(self) -> list[str]:
        """`train` and `val`, as far as their tars are there."""
        return [split for split, name in zip(SPLITS, (TRAIN_TAR, VAL_TAR), strict=True) if (self.root / name).is_file()]

    def listing(self, split: str) -> Listing:
        """The split's items, named by the tars; labels from the devkit's synsets."""
        ids = _read_synsets(self.root / DEVKIT)
        classes = tuple(sorted(ids.values(), key=lambda c: c.wnid))
        label_of = {c.wnid: label for label, c in enumerate(classes)}
        if split == "train":
            items = Items.of(_train_items(self.root / TRAIN_TAR, label_of))
        else:
            truth = _read_truth(self.root / DEVKIT)
            if unknown := set(truth) - set(ids):
                raise ValueError(
                    f"{self.root / DEVKIT}: ground truth names class {min(unknown)}, which meta.mat has not"
                )
            items = Items.of(_val_items(self.root / VAL_TAR, [label_of[ids[i].wnid] for i in truth]))
        return Listing(self.layout, split, classes, items)


def _read_synsets(devkit: Path) -> dict[int, ClassName]:
    """ILSVRC2012_ID -> class, of the leaves among the devkit's synsets (data/meta.mat)."""
    with _devkit_file(devkit, "data/meta.mat") as file:
        try:
            synsets = scipy.io.loadmat(BytesIO(file.read()), squeeze_me=True)["synsets"]
            rows = zip(
                synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["words"], synsets["num_children"], strict=True
            )
            return {int(i): ClassName(str(wnid), str(words)) for i, wnid, words, children in rows if not children}
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{devkit}: its data/meta.mat holds no synsets ({error}); download it again") from error


def _read_truth(devkit: Path) -> list[int]:
    """ILSVRC2012_ID of every validation picture, in order of their numbers."""
    with _devkit_file(devkit, "data/ILSVRC2012_validation_ground_truth.txt") as file:
        return [int(line) for line in file.read().split()]


def _devkit_file(devkit: Path, name: str) -> IO[bytes]:
    if not devkit.is_file():
        raise ValueError(f"{devkit}: missing; the class names come from it, put it beside the image tars")
    with open_tar(devkit) as tar:
        for member in tar:
            if member.name.endswith(name):
                file = tar.extractfile(member)
                assert file is not None
                return BytesIO(file.read())
    raise ValueError(f"{devkit}: no {name} in it; expected ILSVRC2012's devkit for tasks 1 and 2, download it again")


def _train_items(path: Path, label_of: dict[str, int]) -> Iterator[Item]:
    for class_tar, offset, size in read_members(path):
        wnid = class_tar.removesuffix(".tar").rpartition("/")[2]
        if wnid not in label_of:
            raise ValueError(
                f"{path}: holds {class_tar}, which is no class of the devkit beside it; use matching files"
            )
        before = None
        for name, item_offset, item_size in read_members(path, (offset, size)):
            before = name
            yield Item(key_of(name), label_of[wnid], path, item_offset, item_size)
        if before is None:
            raise ValueError(f"{path}: {class_tar} in it holds no image; download it again")


def _val_items(path: Path, labels: Sequence[int]) -> Iterator[Item]:
    """Validation pictures carry their number, ILSVRC2012_val_00000001.JPEG; line 1 of the ground truth is its class."""
    found = 0
    for name, offset, size in read_members(path):
        number = re.search(r"_(\d{8})\.", name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise ValueError(f"{path}: holds {name}, expected ILSVRC2012_val_00000001.JPEG to {len(labels):08d}")
        found += 1
        yield Item(key_of(name), labels[int(number[1]) - 1], path, offset, size)
    if found != len(labels):
        raise ValueError(f"{path}: {found} images, but the devkit's ground truth has {len(labels)}; use matching files")
