"""ImageNet as image-net.org distributes it, three files that stay packed: the layout `ilsvrc`.

    ILSVRC2012_img_train.tar          one tar per class, named by wnid, inside one tar
    ILSVRC2012_img_val.tar            validation images in one tar, numbered
    ILSVRC2012_devkit_t12.tar.gz      class names (data/meta.mat) and validation classes (ground truth)

In: the folder. Out: a `Listing` whose items give the byte range of each image in the outer tar, so an image takes one
read, even in a tar inside a tar.
"""

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
    """A `Source` with the three ILSVRC2012 files in folder `root`."""

    root: Path
    layout: str = "ilsvrc"
    expected: str = f"{TRAIN_TAR} or {VAL_TAR} with {DEVKIT}"

    def splits(self) -> list[str]:
        """The splits whose tar exists."""
        return [split for split, name in zip(SPLITS, (TRAIN_TAR, VAL_TAR), strict=True) if (self.root / name).is_file()]

    def listing(self, split: str) -> Listing:
        """Items in the order of the tar; classes and their words come from the devkit."""
        class_of_id = _read_synsets(self.root / DEVKIT)
        classes = tuple(sorted(class_of_id.values(), key=lambda c: c.wnid))
        label_of = {c.wnid: label for label, c in enumerate(classes)}
        if split == "train":
            items = Items.of(_train_items(self.root / TRAIN_TAR, label_of))
        else:
            ids = _read_ground_truth(self.root / DEVKIT)
            if unknown := set(ids) - set(class_of_id):
                raise ValueError(
                    f"{self.root / DEVKIT}: its ground truth names class {min(unknown)}, but its meta.mat has no such"
                    " class; download it again"
                )
            items = Items.of(_val_items(self.root / VAL_TAR, [label_of[class_of_id[i].wnid] for i in ids]))
        return Listing(self.layout, split, classes, items)


def _read_synsets(devkit: Path) -> dict[int, ClassName]:
    """ILSVRC2012_ID -> class, from the devkit's data/meta.mat. Only leaves of the WordNet tree are classes."""
    with _devkit_file(devkit, "data/meta.mat") as file:
        try:
            synsets = scipy.io.loadmat(BytesIO(file.read()), squeeze_me=True)["synsets"]
            rows = zip(
                synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["words"], synsets["num_children"], strict=True
            )
            return {int(i): ClassName(str(wnid), str(words)) for i, wnid, words, children in rows if not children}
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{devkit}: its data/meta.mat holds no synsets ({error}); download it again") from error


def _read_ground_truth(devkit: Path) -> list[int]:
    """ILSVRC2012_ID of every validation image, in the order of their numbers."""
    with _devkit_file(devkit, "data/ILSVRC2012_validation_ground_truth.txt") as file:
        return [int(line) for line in file.read().split()]


def _devkit_file(devkit: Path, name: str) -> IO[bytes]:
    """The devkit's member whose path ends with `name`, in memory."""
    if not devkit.is_file():
        raise ValueError(f"{devkit}: missing; it has the class names; put it beside the image tars")
    with open_tar(devkit) as tar:
        for member in tar:
            if member.name.endswith(name):
                file = tar.extractfile(member)
                assert file is not None
                return BytesIO(file.read())
    raise ValueError(f"{devkit}: no {name} in it; expected ILSVRC2012's devkit for tasks 1 and 2, download it again")


def _train_items(path: Path, label_of: dict[str, int]) -> Iterator[Item]:
    """The images of the training tar, class tar by class tar."""
    for class_tar, offset, size in read_members(path):
        wnid = class_tar.removesuffix(".tar").rpartition("/")[2]
        if wnid not in label_of:
            raise ValueError(f"{path}: holds {class_tar}, which is no class of the devkit; use matching files")
        found = 0
        for name, item_offset, item_size in read_members(path, (offset, size)):
            found += 1
            yield Item(key_of(name), label_of[wnid], path, item_offset, item_size)
        if not found:
            raise ValueError(f"{path}: {class_tar} in it holds no image; download it again")


def _val_items(path: Path, labels: Sequence[int]) -> Iterator[Item]:
    """The images of the validation tar. `labels[n - 1]` is the label of image n, ILSVRC2012_val_<n, 8 digits>.JPEG."""
    found = 0
    for name, offset, size in read_members(path):
        number = re.search(r"_(\d{8})\.", name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise ValueError(
                f"{path}: holds {name}, expected ILSVRC2012_val_00000001.JPEG to {len(labels):08d}; download it again"
            )
        found += 1
        yield Item(key_of(name), labels[int(number[1]) - 1], path, offset, size)
    if found != len(labels):
        raise ValueError(f"{path}: {found} images, but the devkit's ground truth has {len(labels)}; use matching files")
