"""ImageNet as Kaggle's "ImageNet Object Localization Challenge" distributes it, unpacked: the layout `kaggle`.

    ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG   training images by class
    ILSVRC/Data/CLS-LOC/val/*.JPEG            validation images in one folder
    LOC_val_solution.csv                      the class of each validation image
    LOC_synset_mapping.txt                    wnid and words of each class; optional

In: the folder. Out: a `Listing` with one item per file. CLS-LOC/test has no public classes and is ignored.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.imagenet.folders import folder_item, items_by_folder, list_files, list_folders
from pipeline.imagenet.listing import SPLITS, ClassName, Item, Items, Listing, unique

SOLUTION = "LOC_val_solution.csv"
MAPPING = "LOC_synset_mapping.txt"


@dataclass(frozen=True)
class KaggleFolders:
    """A `Source` with the challenge's files in `root`.

    Both splits have the classes of the mapping. Without a mapping they have the classes of the training folders and of
    the solution together.
    """

    root: Path
    layout: str = "kaggle"
    expected: str = f"ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG with {SOLUTION}"

    def splits(self) -> list[str]:
        """`train` if it has a class folder, `val` if it has an image."""
        train, val = list_folders(self._images("train")), list_files(self._images("val"))
        return [split for split, found in zip(SPLITS, (train, val), strict=True) if next(found, None)]

    def listing(self, split: str) -> Listing:
        """Items of `train` by class, then name; items of `val` by name."""
        folders, solution = sorted(list_folders(self._images("train"))), self.root / SOLUTION
        wnid_of = _read_solution(solution) if split == "val" or solution.is_file() else {}
        words = _read_mapping(self.root / MAPPING)
        wnids = sorted(words or {*wnid_of.values(), *(folder.name for folder in folders)})
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
        for folder in folders:
            if folder.name not in label_of:
                raise ValueError(f"{folder}: no class of {MAPPING}; use matching files")
        if split == "train":
            items = Items.of(items_by_folder(folders, wnids))
        else:
            items = Items.of(_val_items(self._images("val"), solution, wnid_of, label_of))
        return Listing(self.layout, split, tuple(ClassName(w, words.get(w, w)) for w in wnids), unique(items, wnids))

    def _images(self, split: str) -> Path:
        return self.root / "ILSVRC" / "Data" / "CLS-LOC" / split


def _val_items(folder: Path, solution: Path, wnid_of: Mapping[str, str], label_of: Mapping[str, int]) -> Iterator[Item]:
    """The validation images by name. ValueError if image files and `solution` do not name the same images."""
    entries = sorted(list_files(folder), key=lambda e: e.name)
    for entry in entries:
        wnid = wnid_of.get(os.path.splitext(entry.name)[0])
        if wnid is None:
            raise ValueError(f"{entry.path}: no line of {solution.name} names it; use matching files")
        if wnid not in label_of:
            raise ValueError(f"{solution}: {wnid} is no class of {MAPPING}; use matching files")
        yield folder_item(entry, label_of[wnid])
    if missing := wnid_of.keys() - {os.path.splitext(entry.name)[0] for entry in entries}:
        raise ValueError(f"{solution}: names {min(missing)}, which is not in {folder}; unpack the set again")


def _read_solution(path: Path) -> dict[str, str]:
    """Image name -> wnid.

    The wnid is the first word of PredictionString, `n01751748 111 108 230 230 ...`; the numbers are a bounding box.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing; it has the classes of val; put it there")
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: begins with {rows.fieldnames}, expected ImageId,PredictionString")
        wnid_of = {}
        for row in rows:
            if not (words := (row["PredictionString"] or "").split()):
                raise ValueError(f"{path}: line {rows.line_num} has no class; download it again")
            wnid_of[row["ImageId"]] = words[0]
    return wnid_of


def _read_mapping(path: Path) -> dict[str, str]:
    """Wnid -> words, from lines such as `n01440764 tench, Tinca tinca`; empty if there is no such file."""
    if not path.is_file():
        return {}
    lines = (line.strip().partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
    return {wnid: words.strip() or wnid for wnid, _, words in lines if wnid}
