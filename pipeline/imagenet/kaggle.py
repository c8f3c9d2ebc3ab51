"""TODO-DOC pipeline.imagenet.kaggle (from pipeline.file_layouts)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.imagenet.folders import folder_item, items_by_folder, list_files, list_folders
from pipeline.imagenet.listing import SPLITS, ClassName, Item, Items, Listing, unique


@dataclass(frozen=True)
class KaggleFolders:
    """The files of Kaggle's "ImageNet Object Localization Challenge", unpacked in `root`; CLS-LOC/test is ignored.

    Training pictures lie in class folders. Those for validation lie in one folder, and LOC_val_solution.csv has their
    classes; LOC_synset_mapping.txt has the words. Both splits have the classes of the mapping, where it is there.
    """

    root: Path
    layout: str = "kaggle"
    expected: str = "ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG with LOC_val_solution.csv"

    def splits(self) -> list[str]:
        """`train` if it has a folder, `val` if it has a picture."""
        train, val = list_folders(self._pictures("train")), list_files(self._pictures("val"))
        return [split for split, found in zip(SPLITS, (train, val), strict=True) if next(found, None)]

    def listing(self, split: str) -> Listing:
        """Items by class, then name; those of `val` by name."""
        folders, table = sorted(list_folders(self._pictures("train"))), self.root / "LOC_val_solution.csv"
        wnid_of = _read_solution(table) if split == "val" or table.is_file() else {}
        words = _read_mapping(self.root / "LOC_synset_mapping.txt")
        wnids = sorted(words or {*wnid_of.values(), *(folder.name for folder in folders)})
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
        for folder in folders:
            if folder.name not in label_of:
                raise ValueError(f"{folder}: no class of LOC_synset_mapping.txt; use matching files")
        if split == "train":
            items = Items.of(items_by_folder(folders, wnids))
        else:
            items = Items.of(_val_items(self._pictures("val"), table, wnid_of, label_of))
        return Listing(self.layout, split, tuple(ClassName(w, words.get(w, w)) for w in wnids), unique(items, wnids))

    def _pictures(self, split: str) -> Path:
        return self.root / "ILSVRC" / "Data" / "CLS-LOC" / split


def _val_items(folder: Path, table: Path, wnid_of: Mapping[str, str], label_of: Mapping[str, int]) -> Iterator[Item]:
    entries = sorted(list_files(folder), key=lambda e: e.name)
    for entry in entries:
        wnid = wnid_of.get(os.path.splitext(entry.name)[0])
        if wnid is None:
            raise ValueError(f"{entry.path}: no line of {table.name} names it; use matching files")
        if wnid not in label_of:
            raise ValueError(f"{table}: {wnid} is no class of LOC_synset_mapping.txt; use matching files")
        yield folder_item(entry, label_of[wnid])
    if missing := wnid_of.keys() - {os.path.splitext(entry.name)[0] for entry in entries}:
        raise ValueError(f"{table}: names {min(missing)}, which is not in {folder}; unpack the set again")


def _read_solution(path: Path) -> dict[str, str]:
    """Picture -> wnid: the first word of PredictionString, `n01751748 111 108 230 230 ...` (the rest are boxes)."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; the classes of val come from it, put it there")
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
    """Wnid -> words, from lines as `n01440764 tench, Tinca tinca`; empty where there is no such file."""
    if not path.is_file():
        return {}
    lines = (line.strip().partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
    return {wnid: words.strip() or wnid for wnid, _, words in lines if wnid}
