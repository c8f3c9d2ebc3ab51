"""ImageNet in WebDataset tars, such as those that make_shards writes: the layout `webdataset`.

    train/*.tar, val/*.tar        or tars in one folder whose names contain the split

A sample is a run of neighbouring members that share a name: one image (.jpg, .jpeg, .png, .webp) and a label (.cls, a
number or a name; or .json with "label" or "cls").

In: the folder. Out: a `Listing` whose items give the byte range of each image in its tar. A tar named by a wnid
(n01440764.tar) is ignored: ILSVRC's training tar unpacks to such files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from pipeline.imagenet.labels import LabelledImage, Scan, classes_by_label, listing_of, scan_of
from pipeline.imagenet.listing import SPLITS, ClassName, Listing, key_of
from pipeline.imagenet.tar_members import read_members

MANIFEST = "manifest.json"  # of a shard set. It is defined here because `shards` imports `imagenet`, never the reverse.
IMAGE_FIELDS = frozenset({"jpg", "jpeg", "png", "webp"})
# WebDataset's rule: a member's name up to the first dot of its base name is the sample, the rest is the field.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|validation|test)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class WebDatasetTars:
    """A `Source` with WebDataset tars in `root`/train and `root`/val, or in `root` itself.

    The classes come from the manifest that make_shards wrote beside the tars. Without a manifest they come from the
    wnids in the keys and, if there are none, from the labels.
    """

    root: Path
    layout: str = "webdataset"
    expected: str = "train/*.tar or *train*.tar with .jpg and .cls"
    _scans: dict[str, Scan] = field(default_factory=dict, init=False, compare=False, repr=False)

    def splits(self) -> list[str]:
        """The splits that have a tar."""
        return [split for split, tars in self._tars().items() if tars]

    def listing(self, split: str) -> Listing:
        """Items in the order of the tars.

        Without a manifest the tars of all splits are read once, since only together they tell what a label means.
        """
        class_of = self._classes_in_manifest(split)
        if class_of is None:
            scans = [self._scan(s) for s in self.splits()]
            words = {label: label for scan in scans for label in scan.labels if not label.isdecimal()}
            class_of = classes_by_label(scans, words)
        return listing_of(self.layout, split, self._scan(split), class_of)

    def _classes_in_manifest(self, split: str) -> dict[str, ClassName] | None:
        """Label -> class, from the manifest of the split or, without one, of another split; None without any."""
        tars = self._tars()
        own_first = sorted(tars, key=lambda other: other != split)
        for path in [tars[s][0].parent / MANIFEST for s in own_first if tars[s]]:
            if (class_of := _manifest_classes(path)) is not None:
                if unknown := set(self._scan(split).labels) - set(class_of):
                    raise ValueError(
                        f"{path}: no class {min(unknown)}, which a sample of {split} has; use matching files"
                    )
                return class_of
        return None

    def _scan(self, split: str) -> Scan:
        if split not in self._scans:
            tars = self._tars()[split]
            self._scans[split] = scan_of(image for tar in tars for image in _images(tar))
            if not self._scans[split].labels:
                raise ValueError(f"{tars[0]}: no sample in it, nor in any other tar of {split}; download the set again")
        return self._scans[split]

    def _tars(self) -> dict[str, list[Path]]:
        """Split -> its tars, sorted. Tars in `root` itself count only if there is no folder named by a split."""
        if any((self.root / split).is_dir() for split in SPLITS):
            return {split: _shards(self.root / split) for split in SPLITS}
        split_of = {path: _split_in(path.name) for path in _shards(self.root)}
        if unclear := [path for path, split in split_of.items() if split is None]:
            if len(unclear) < len(split_of):
                raise ValueError(
                    f"{unclear[0]}: no split in its name, unlike other tars; expected train or val in it; rename it"
                )
            return {"train": unclear, "val": []}
        return {split: [path for path, s in split_of.items() if s == split] for split in SPLITS}


def _shards(folder: Path) -> list[Path]:
    """The tars in `folder`, sorted, without those named by a wnid."""
    return sorted(p for p in folder.glob("*.tar") if p.is_file() and not re.fullmatch(r"n\d{8}", p.stem))


def _split_in(name: str) -> str | None:
    """The split in a tar's name: preferably a word of its own (imagenet1k-train-0000), otherwise part of a word."""
    found = SPLIT_WORD.search(name) or re.search("(train|val)", name, re.IGNORECASE)
    return {"validation": "val"}.get(found[1].lower(), found[1].lower()) if found else None


def _manifest_classes(path: Path) -> dict[str, ClassName] | None:
    """Label -> class, from a manifest that make_shards wrote; None if there is no file or another tool wrote it."""
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict) or not str(fields.get("format")).startswith("alexnet-pipeline shards"):
            return None
        return {str(label): ClassName(c["wnid"], c["words"]) for label, c in enumerate(fields["classes"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no classes in it ({error!r}); restore it, or remove it to take the classes from keys and labels"
        ) from error


def _images(tar: Path) -> Iterator[LabelledImage]:
    """The images of a tar with their labels. ValueError for a sample without exactly one image and a label."""
    with tar.open("rb", buffering=0) as file:
        members = ((MEMBER.fullmatch(name), offset, size) for name, offset, size in read_members(tar))
        named = ((match[1], match[2].lower(), offset, size) for match, offset, size in members if match)
        for name, parts in groupby(named, key=lambda part: part[0]):
            fields = [(kind, offset, size) for _, kind, offset, size in parts]
            images = [(offset, size) for kind, offset, size in fields if kind in IMAGE_FIELDS]
            label = _label({kind: os.pread(file.fileno(), n, o) for kind, o, n in fields if kind in ("cls", "json")})
            if len(images) != 1 or label is None:
                kinds = ", ".join(f".{kind}" for kind, _, _ in fields)
                lacks = f"{len(images)} images" if len(images) != 1 else "no label"
                raise ValueError(
                    f"{tar}: sample {name} has {lacks} ({kinds}); expected one of .jpg, .jpeg, .png, .webp and, right"
                    ' beside it, .cls (a number from 0, or a name) or .json with "label"'
                )
            yield LabelledImage(key_of(name), label, tar, *images[0])


def _label(fields: Mapping[str, bytes]) -> str | None:
    """A sample's label as text, a number without leading zeros.

    None if there is no label or a negative number, by which some sets mark an unknown class.
    """
    try:
        if "cls" in fields:
            value: object = fields["cls"].decode()
        else:
            record = json.loads(fields.get("json", b"{}"))
            value = record.get("label", record.get("cls")) if isinstance(record, dict) else None
    except ValueError:
        return None
    text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if re.fullmatch(r"-?\d+", text):
        return str(int(text)) if int(text) >= 0 else None
    return text or None
