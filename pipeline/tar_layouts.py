"""ImageNet in tars, read where they are: image-net.org's own three files, and WebDataset sets.

In: a folder. Out: a `Listing` whose items say which bytes of which tar, so a picture inside a tar inside a tar costs
one read. A `.tar` named as a class (n01440764.tar) is what ILSVRC's training tar unpacks to, never a WebDataset shard.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import IO

import scipy.io

from pipeline.labels import Scan, classes_by_label, listing_of, scan_of
from pipeline.listing import SPLITS, Item, Items, Listing, key_of
from pipeline.shards import MANIFEST, ClassName

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
PICTURES = frozenset({"jpg", "jpeg", "png", "webp"})
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset: sample, first dot of the base name, field
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|validation|test)(?![a-z])", re.IGNORECASE)


# ---- ilsvrc: the three files of image-net.org ---------------------------------------------------------------------


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
    with _opened_tar(devkit) as tar:
        for member in tar:
            if member.name.endswith(name):
                file = tar.extractfile(member)
                assert file is not None
                return BytesIO(file.read())
    raise ValueError(f"{devkit}: no {name} in it; expected ILSVRC2012's devkit for tasks 1 and 2, download it again")


def _opened_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar ({error}); download it again") from error


def _members(path: Path, within: tuple[int, int] | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the files of a tar, or of the tar that lies `within` (offset, size) of it."""
    with path.open("rb") as file:
        start, size = within or (0, path.stat().st_size)
        try:
            with tarfile.open(fileobj=_Window(file, start, size), mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isreg():
                        yield member.name, start + member.offset_data, member.size
                    tar.members.clear()  # tarfile keeps every header it saw: gigabytes for ImageNet
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not a whole tar at byte {start} ({error}); download it again") from error


class _Window:
    """Part of a file as a file of its own, for tarfile."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        self.file.seek(self.start + self.position)
        data = self.file.read(max(0, min(count, self.size - self.position)))
        self.position += len(data)
        return data


def _train_items(path: Path, label_of: dict[str, int]) -> Iterator[Item]:
    for class_tar, offset, size in _members(path):
        wnid = class_tar.removesuffix(".tar").rpartition("/")[2]
        if wnid not in label_of:
            raise ValueError(
                f"{path}: holds {class_tar}, which is no class of the devkit beside it; use matching files"
            )
        before = None
        for name, item_offset, item_size in _members(path, (offset, size)):
            before = name
            yield Item(key_of(name), label_of[wnid], path, item_offset, item_size)
        if before is None:
            raise ValueError(f"{path}: {class_tar} in it holds no image; download it again")


def _val_items(path: Path, labels: Sequence[int]) -> Iterator[Item]:
    """Validation pictures carry their number, ILSVRC2012_val_00000001.JPEG; line 1 of the ground truth is its class."""
    found = 0
    for name, offset, size in _members(path):
        number = re.search(r"_(\d{8})\.", name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise ValueError(f"{path}: holds {name}, expected ILSVRC2012_val_00000001.JPEG to {len(labels):08d}")
        found += 1
        yield Item(key_of(name), labels[int(number[1]) - 1], path, offset, size)
    if found != len(labels):
        raise ValueError(f"{path}: {found} images, but the devkit's ground truth has {len(labels)}; use matching files")


# ---- webdataset ---------------------------------------------------------------------------------------------------


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
        members = ((MEMBER.fullmatch(name), offset, size) for name, offset, size in _members(tar))
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
