"""Reads the samples of a WebDataset tar: which members belong together, and what their label is.

A sample is the members that share a name up to the first dot. They are usually neighbours; in a tar of an unsorted
folder they are not, so members wait until their sample is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from pipeline.files import doing
from pipeline.imagenet.entries import Skipped, ignored_in_path, image_suffixes, member_skip_reason
from pipeline.imagenet.labels import WNID, LabelledImage
from pipeline.imagenet.parquet_columns import label_text
from pipeline.imagenet.parts import split_of_folder
from pipeline.imagenet.tar_members import read_members

# WebDataset's rule: a member's name up to the first dot of its base name is the sample, the rest is the field.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
LABEL_FIELDS = ("cls", "json", "txt", "label", "class", "wnid", "synset")
JSON_LABELS = ("label", "cls", "class", "class_id", "label_id", "fine_label", "wnid", "synset", "class_name")
MAX_LABEL_BYTES = 1 << 20

Field = tuple[str, int, int]  # name, offset, size


def samples(tar: Path, skipped: Skipped) -> Iterator[LabelledImage]:
    """The images of a tar with their labels. A sample without exactly one image or without a label has a problem."""
    waiting: dict[str, list[Field]] = {}
    done: set[str] = set()
    with doing("read", tar), tar.open("rb", buffering=0) as file:
        for name, parts in groupby(_members(tar, skipped), key=lambda part: part[0]):
            fields = [*waiting.pop(name, []), *((kind, offset, size) for _, kind, offset, size in parts)]
            label = _label(_texts(file.fileno(), fields))
            if label is None or len(_image_fields(fields)) != 1 or name in done:
                waiting[name] = fields
            else:
                done.add(name)
                (_, offset, size), *_ = _image_fields(fields)
                yield LabelledImage(f"{name}.jpg", label, tar, offset, size)
        for name, fields in waiting.items():
            if name in done and not _image_fields(fields):
                continue  # further fields of a sample that is complete
            yield _incomplete(tar, name, fields, name in done)


class OneSplit:
    """Checks that the members of a tar are not those of several splits, by the folders in their names."""

    def __init__(self, tar: Path) -> None:
        self.tar, self.found = tar, dict[str, str]()  # split -> the folder that names it

    def check(self, name: str) -> None:
        """Raises ValueError if the member is of another split than an earlier one."""
        for folder in name.split("/")[:-1]:
            if split := split_of_folder(folder):
                self.found.setdefault(split, folder)
                break
        if len(self.found) > 1:
            folders = " and ".join(self.found.values())
            raise ValueError(f"{self.tar}: holds folders of two splits, {folders}; unpack it: tar -xf {self.tar.name}")


def images_by_name(tar: Path, skipped: Skipped, class_of: Callable[[str], str | None]) -> Iterator[LabelledImage]:
    """Every image of a tar without label members, with the class that its name gives."""
    splits = OneSplit(tar)
    for name, offset, size in read_members(tar):
        splits.check(name)
        if reason := member_skip_reason(tar, name, offset):
            skipped.add(reason, name)
        else:
            label = class_of(name)
            yield LabelledImage(name, label, tar, offset, size, "" if label else f"{name}: no class in its name")


def wnid_in_name(name: str) -> str | None:
    """The wnid in a file name such as n01440764_10026.JPEG; None if it has none."""
    found = WNID.search(os.path.splitext(name.rpartition("/")[2])[0])
    return found[1] if found else None


def class_in_folder(name: str) -> str | None:
    """The folder of a member, as `tench` in train/tench/1.jpg; None if it is in none."""
    folders = [part for part in name.split("/")[:-1] if part not in ("", ".")]
    return folders[-1] if folders and not split_of_folder(folders[-1]) else None


def _members(tar: Path, skipped: Skipped) -> Iterator[tuple[str, str, int, int]]:
    """(sample, field, offset, size) of the members that belong to samples."""
    splits = OneSplit(tar)
    for name, offset, size in read_members(tar):
        splits.check(name)
        if reason := ignored_in_path(name):
            skipped.add(reason, name)
        elif match := MEMBER.fullmatch(name):
            yield match[1], match[2].lower(), offset, size
        else:
            skipped.add("no field in its name", name)


def _image_fields(fields: list[Field]) -> list[Field]:
    return [field for field in fields if f".{field[0]}" in image_suffixes()]


def _texts(descriptor: int, fields: list[Field]) -> dict[str, bytes]:
    """Field -> content, of the fields that may hold a label."""
    return {
        kind: os.pread(descriptor, size, offset)
        for kind, offset, size in fields
        if kind in LABEL_FIELDS and size <= MAX_LABEL_BYTES
    }


def _incomplete(tar: Path, name: str, fields: list[Field], repeated: bool) -> LabelledImage:
    """The entry for a sample that lacks something."""
    images = _image_fields(fields)
    lacks = "no label" if len(images) == 1 and not repeated else f"{len(images) + repeated} images"
    kinds = ", ".join(f".{kind}" for kind, _, _ in fields)
    problem = (
        f"sample {name} has {lacks} ({kinds}); expected one of .jpg, .jpeg, .png, .webp or another image and"
        ' .cls (a number from 0, or a name) or .json with "label"'
    )
    return LabelledImage(f"{name}.jpg", None, tar, 0, 0, problem)


def _label(fields: Mapping[str, bytes]) -> str | None:
    """A sample's label as text; None if there is none, or a negative number, by which some sets mark an unknown class.

    A .txt member counts only if it holds a number or a wnid, because it is a caption in many sets.
    """
    try:
        for kind in LABEL_FIELDS:
            if kind not in fields:
                continue
            if kind == "json":
                label = _json_label(json.loads(fields[kind]))
            else:
                label = label_text(fields[kind].decode())
                if kind == "txt" and not (label and (label.isdecimal() or re.fullmatch(r"n\d{8}", label))):
                    label = None
            if label is not None or kind == "cls":
                return label
    except ValueError:
        pass
    return None


def _json_label(record: object) -> str | None:
    """The label in a JSON member: a value, a list of one value, or an object with one of JSON_LABELS."""
    if isinstance(record, dict):
        record = next((record[name] for name in JSON_LABELS if name in record), None)
    return label_text(record)
