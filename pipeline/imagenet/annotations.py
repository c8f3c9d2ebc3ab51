"""The classes of images that are not in class folders: from a table beside them, the devkit, or their file names."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.imagenet.devkit import DEVKIT, find_devkit, number_of, read_ground_truth
from pipeline.imagenet.entries import text_of
from pipeline.imagenet.kaggle import SOLUTION, read_solution
from pipeline.imagenet.keys import stem_of
from pipeline.imagenet.labels import WNID
from pipeline.imagenet.parquet_columns import LABEL_NAMES, label_text

METADATA = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's imagefolder: file_name and a label
ANNOTATIONS = "val_annotations.txt"  # tiny-imagenet-200: NAME, wnid and a bounding box, separated by tabs


@dataclass(frozen=True)
class FileClasses:
    """Where the classes of a folder's images come from.

    Attributes:
        path: The table; None if the file names hold the classes.
        read: Gives a function from a file name to a wnid, or to None, and the stems of all images that it names.
    """

    path: Path | None
    read: Callable[[], tuple[Callable[[str], str | None], frozenset[str]]]


def find_file_classes(split: str, folder: Path, names: Sequence[str], roots: Sequence[Path]) -> FileClasses | None:
    """Where the classes of flat images come from; None if nothing says them.

    Args:
        split: `train` or `val`.
        folder: The folder of the images.
        names: The first few file names.
        roots: Folders that may hold tables, the source's folder first.
    """
    for path in [f / f"{s}_annotations.txt" for f in (folder, folder.parent) for s in (split, "val")]:
        if path.is_file():
            return FileClasses(path, lambda path=path: _by_stem(_read_annotations(path)))  # type: ignore[misc]
    for path in [f / name for f in (folder, folder.parent) for name in METADATA if (f / name).is_file()]:
        if rows := _read_metadata(path):
            return FileClasses(path, lambda rows=rows: _by_stem(rows))  # type: ignore[misc]
    if names and all(WNID.search(os.path.splitext(name)[0]) for name in names):
        return FileClasses(None, lambda: (_wnid_in, frozenset()))
    if split != "val":
        return None
    if table := next((root / SOLUTION for root in roots if (root / SOLUTION).is_file()), None):
        return FileClasses(table, lambda: _by_stem(read_solution(table)))
    if (devkit := find_devkit(*roots)) and any(number_of(name) for name in names):
        return FileClasses(devkit, lambda: _by_number(read_ground_truth(devkit)))
    return None


def missing_classes(split: str, folder: Path, count: int, root: Path, kaggle: bool) -> str:
    """The message for flat images whose classes nothing says."""
    above = next((p for p in root.resolve().parents[:4] if (p / SOLUTION).is_file() or find_devkit(p)), None)
    found = f"{folder}: {count:,} images without class folders"
    if above is not None and split == "val":
        return f"{found}; their classes are in {above}: run make_shards.py with {above} as SOURCE"
    if kaggle and split == "val":
        return f"{root / SOLUTION}: missing; it has the classes of val; put it there, or use --split train"
    if split == "val":
        return (
            f"{found}, and nothing says their classes; put {DEVKIT} or {SOLUTION} into {root} or {ANNOTATIONS} into"
            f" {folder}, or sort the images into {folder}/<wnid>, or use --split train"
        )
    return f"{found}; sort them into {folder}/<wnid>"


def _wnid_in(name: str) -> str | None:
    found = WNID.search(os.path.splitext(name)[0])
    return found[1] if found else None


def _by_stem(wnid_of: dict[str, str]) -> tuple[Callable[[str], str | None], frozenset[str]]:
    return lambda name: wnid_of.get(os.path.splitext(name)[0]), frozenset(wnid_of)


def _by_number(wnids: list[str]) -> tuple[Callable[[str], str | None], frozenset[str]]:
    def wnid_of(name: str) -> str | None:
        number = number_of(name)
        return wnids[number - 1] if number and number <= len(wnids) else None

    return wnid_of, frozenset(f"ILSVRC2012_val_{n:08d}" for n in range(1, len(wnids) + 1))


def _read_metadata(path: Path) -> dict[str, str]:
    """Stem of the file name -> label; empty if the table has no label."""
    text = text_of(path)
    try:
        lines = text.splitlines()
        rows = (
            [json.loads(line) for line in lines if line.strip()] if path.suffix == ".jsonl" else csv.DictReader(lines)
        )
        found = [(str(row["file_name"]), label_text(next(row[n] for n in LABEL_NAMES if n in row))) for row in rows]
    except (KeyError, StopIteration):
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a table with file_name and label ({error}); correct it, or remove it") from error
    return {stem_of(name): label for name, label in found if label is not None}


def _read_annotations(path: Path) -> dict[str, str]:
    """Stem of the file name -> wnid. The words of a line are separated by tabs or spaces."""
    rows = (line.split() for line in text_of(path).splitlines())
    return {os.path.splitext(row[0])[0]: row[1] for row in rows if len(row) > 1}
