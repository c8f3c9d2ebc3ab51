"""ImageNet in tars, read where they are: image-net.org's own three files, and WebDataset sets.

In: a folder. Out: a `Listing` whose items say which bytes of which tar, so a picture inside a tar inside a tar costs
one read. A `.tar` named as a class (n01440764.tar) is what ILSVRC's training tar unpacks to, never a WebDataset shard.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from pipeline.imagenet.labels import Scan, classes_by_label, listing_of, scan_of
from pipeline.imagenet.listing import SPLITS, ClassName, Listing, key_of
from pipeline.imagenet.tar_members import read_members

MANIFEST = "manifest.json"
PICTURES = frozenset({"jpg", "jpeg", "png", "webp"})
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset: sample, first dot of the base name, field
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|validation|test)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class WebDatasetTars:
    """A WebDataset set: `root`/train/*.tar and `root`/val/*.tar, or tars in `root` whose names tell their split.

    A sample is a picture (jpg, jpeg, png, webp) with its label: `.cls`, a number or a name, or else `label` (or `cls`)
    in `.json`. Classes come from our own manifest beside the tars, else from wnids in the keys, else from the labels.
    """

    root: Path
    layout: str = "webdataset"
    expected: str = "train/*.tar or *train*.tar with .jpg and .cls"
    _scans: dict[str, Scan] = field(default_factory=dict, init=False, compare=False, repr=False)

    def splits(self) -> list[str]:
        """The splits that have a tar."""
        return [split for split, tars in self._tars().items() if tars]

    def listing(self, split: str) -> Listing:
        """Items in the order of the tars. Reads all splits' tars once, since each may tell what a label means."""
        tars = self._tars()
        manifests = [t[0].parent / MANIFEST for s, t in sorted(tars.items(), key=lambda i: i[0] != split) if t]
        for path in manifests:
            if (class_of := _manifest_classes(path)) is not None:
                scan = self._scan(split)
                if unknown := set(scan.labels) - set(class_of):
                    raise ValueError(
                        f"{path}: no class {min(unknown)}, which a sample of {split} has; use matching files"
                    )
                return listing_of(self.layout, split, scan, class_of)
        scans = [self._scan(s) for s in self.splits()]
        words = {label: label for scan in scans for label in scan.labels if not label.isdecimal()}
        return listing_of(self.layout, split, self._scan(split), classes_by_label(scans, words))

    def _scan(self, split: str) -> Scan:
        if split not in self._scans:
            tars = self._tars()[split]
            self._scans[split] = scan_of(sample for tar in tars for sample in _samples(tar))
            if not self._scans[split].labels:
                raise ValueError(f"{tars[0]}: no sample in it, nor in any other tar of {split}; download the set again")
        return self._scans[split]

    def _tars(self) -> dict[str, list[Path]]:
        """Split -> its tars, sorted. Tars that lie in `root` itself count where there is no folder of a split."""
        if any((self.root / split).is_dir() for split in SPLITS):
            return {split: _shards(self.root / split) for split in SPLITS}
        split_of = {path: _split_in(path.name) for path in _shards(self.root)}
        if unclear := [path for path, split in split_of.items() if split is None]:
            if len(unclear) < len(split_of):
                raise ValueError(f"{unclear[0]}: its name tells no split, others' do; expected train or val in it")
            return {"train": unclear, "val": []}
        return {split: [path for path, s in split_of.items() if s == split] for split in SPLITS}


def _shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.tar") if p.is_file() and not re.fullmatch(r"n\d{8}", p.stem))


def _split_in(name: str) -> str | None:
    """The split that a tar's name tells: as a word of its own (imagenet1k-train-0000), else within one."""
    found = SPLIT_WORD.search(name) or re.search("(train|val)", name, re.IGNORECASE)
    return {"validation": "val"}.get(found[1].lower(), found[1].lower()) if found else None


def _manifest_classes(path: Path) -> dict[str, ClassName] | None:
    """Label -> class of a manifest that make_shards wrote; None where there is none, or somebody else's."""
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict) or not str(fields.get("format")).startswith("alexnet-pipeline shards"):
            return None
        return {str(label): ClassName(c["wnid"], c["words"]) for label, c in enumerate(fields["classes"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no classes in it ({error!r}); mend it, or remove it to go by the keys") from error


def _samples(tar: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """(key, label, tar, offset, size) of a shard's samples: members that follow one another and share their name."""
    with tar.open("rb", buffering=0) as file:
        members = ((MEMBER.fullmatch(name), offset, size) for name, offset, size in read_members(tar))
        named = ((match[1], match[2].lower(), offset, size) for match, offset, size in members if match)
        for name, parts in groupby(named, key=lambda part: part[0]):
            fields = [(kind, offset, size) for _, kind, offset, size in parts]
            pictures = [(offset, size) for kind, offset, size in fields if kind in PICTURES]
            label = _label({kind: os.pread(file.fileno(), n, o) for kind, o, n in fields if kind in ("cls", "json")})
            if len(pictures) != 1 or label is None:
                kinds = ", ".join(f".{kind}" for kind, _, _ in fields)
                lacks = f"{len(pictures)} pictures" if len(pictures) != 1 else "no label"
                raise ValueError(
                    f"{tar}: sample {name} has {lacks} ({kinds}); expected one of .jpg, .jpeg, .png, .webp and, right"
                    ' beside it, .cls (a number from 0, or a name) or .json with "label"'
                )
            yield key_of(name), label, tar, *pictures[0]


def _label(fields: dict[str, bytes]) -> str | None:
    """The label as text, numbers without leading zeros; None where there is none, or one below 0 ("not known")."""
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
