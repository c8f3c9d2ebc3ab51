"""Where ImageNet lives: the layouts it ships in, as one list of items in a fixed order, nothing unpacked.

    ilsvrc    ILSVRC2012_img_train.tar (a tar of one tar per class), ILSVRC2012_img_val.tar (flat) and
              ILSVRC2012_devkit_t12.tar.gz in one folder, as image-net.org serves them
    folders   train/<wnid>/*.JPEG and val/<wnid>/*.JPEG

`open_source` finds the layout; `Source.listing(split)` gives the items. An item says where its bytes are (file, offset,
size), so a picture inside a tar inside a tar costs one read. The same files always give the same listing.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Protocol

import scipy.io

from pipeline.shards import KEY_LIMIT, ClassName

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SPLITS = ("train", "val")
SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of the source: `size` bytes at `offset` of `file`."""

    key: str
    label: int
    file: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Listing:
    """A split of the source: items in the source's order and classes sorted by wnid (position = label)."""

    layout: str
    split: str
    classes: tuple[ClassName, ...]
    items: tuple[Item, ...]

    def record(self) -> dict[str, object]:
        """What the manifest says of the source; the fingerprint changes with any key, label or size."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.key} {item.label} {item.size}\n".encode())
        return {"layout": self.layout, "images": len(self.items), "fingerprint": digest.hexdigest()}


class Source(Protocol):
    """A place that holds ImageNet in some layout."""

    @property
    def layout(self) -> str:
        """Its name, for the manifest and the log."""
        ...

    def splits(self) -> list[str]:
        """The splits that are there, of SPLITS."""
        ...

    def listing(self, split: str) -> Listing:
        """Reads the split's listing; ValueError where its files are not what the layout says."""
        ...


def open_source(root: Path) -> Source:
    """Recognises the layout under `root`; ValueError with what was expected where there is none."""
    if not root.is_dir():
        raise ValueError(
            f"{root}: no such folder; expected one with {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}, or train/<wnid>/"
        )
    for source in (IlsvrcTars(root), ClassFolders(root)):
        if source.splits():
            return source
    found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
    raise ValueError(
        f"{root}: no ImageNet layout here (found {found}); expected {TRAIN_TAR} or {VAL_TAR} with {DEVKIT},"
        " or train/<wnid>/*.JPEG"
    )


# ---- ilsvrc: the three files of image-net.org ---------------------------------------------------------------------


@dataclass(frozen=True)
class IlsvrcTars:
    """The three ILSVRC2012 files in folder `root`."""

    root: Path
    layout: str = "ilsvrc"

    def splits(self) -> list[str]:
        """`train` and `val`, as far as their tars are there."""
        return [split for split, name in zip(SPLITS, (TRAIN_TAR, VAL_TAR), strict=True) if (self.root / name).is_file()]

    def listing(self, split: str) -> Listing:
        """The split's items, named by the tars; labels from the devkit's synsets."""
        ids = _read_synsets(self.root / DEVKIT)
        classes = tuple(sorted(ids.values(), key=lambda c: c.wnid))
        label_of = {c.wnid: label for label, c in enumerate(classes)}
        if split == "train":
            items = tuple(_train_items(self.root / TRAIN_TAR, label_of))
        else:
            truth = _read_truth(self.root / DEVKIT)
            if unknown := set(truth) - set(ids):
                raise ValueError(
                    f"{self.root / DEVKIT}: ground truth names class {min(unknown)}, which meta.mat has not"
                )
            items = tuple(_val_items(self.root / VAL_TAR, [label_of[ids[i].wnid] for i in truth]))
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
        data = self.file.read(min(count, self.size - self.position))
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
            yield Item(_key(name), label_of[wnid], path, item_offset, item_size)
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
        yield Item(_key(name), labels[int(number[1]) - 1], path, offset, size)
    if found != len(labels):
        raise ValueError(f"{path}: {found} images, but the devkit's ground truth has {len(labels)}; use matching files")


# ---- folders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassFolders:
    """`root`/train/<class>/ and `root`/val/<class>/."""

    root: Path
    layout: str = "folders"

    def splits(self) -> list[str]:
        """The splits whose folder holds at least one folder."""
        return [s for s in SPLITS if (self.root / s).is_dir() and any(p.is_dir() for p in (self.root / s).iterdir())]

    def listing(self, split: str) -> Listing:
        """Items by class, then name. Labels are positions in the sorted class folders of the split."""
        folders = sorted(path for path in (self.root / split).iterdir() if path.is_dir())
        items: list[Item] = []
        for label, folder in enumerate(folders):
            entries = sorted((e for e in os.scandir(folder) if _is_image(e)), key=lambda e: e.name)
            if not entries:
                raise ValueError(f"{folder}: a class folder with no image; add its images or remove the folder")
            items += [Item(_key(e.name), label, Path(e.path), 0, e.stat().st_size) for e in entries]
        classes = tuple(ClassName(folder.name, folder.name) for folder in folders)
        return Listing(self.layout, split, classes, tuple(_unique(items, [folder.name for folder in folders])))


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() and os.path.splitext(entry.name)[1].lower() in SUFFIXES


def _unique(items: Iterable[Item], class_names: Sequence[str]) -> Iterator[Item]:
    """Items whose key stands once; where a name is used in several classes, the class goes before it."""
    items = list(items)
    counts = Counter(item.key for item in items)
    seen: set[str] = set()
    for item in items:
        key = item.key if counts[item.key] == 1 else _key(f"{class_names[item.label]}_{item.file.name}")
        if key in seen:
            raise ValueError(f"{item.file}: its key {key!r} is another image's too; rename one of them")
        seen.add(key)
        yield Item(key, item.label, item.file, item.offset, item.size)


def _key(name: str) -> str:
    """A picture's file name as a key: no folder, no suffix, no dots or spaces, at most 90 characters."""
    stem = os.path.splitext(name.rpartition("/")[2])[0]
    key = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
    if not 0 < len(key) <= KEY_LIMIT:
        raise ValueError(f"{name}: its name makes a key of {len(key)} characters, expected 1 to {KEY_LIMIT}; rename it")
    return key


# ---- reading ------------------------------------------------------------------------------------------------------


class ItemReader:
    """Reads items' bytes, as a context; keeps the last file open, since neighbours share a tar."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: IO[bytes] | None = None

    def read(self, item: Item) -> bytes:
        """The item's bytes; ValueError where the file is shorter than it was when listed."""
        if self._file is None or self._path != item.file:
            self._close()
            self._path, self._file = item.file, item.file.open("rb", buffering=0)
        data = os.pread(self._file.fileno(), item.size, item.offset)
        if len(data) != item.size or (item.offset == 0 and os.fstat(self._file.fileno()).st_size != item.size):
            raise ValueError(f"{item.file}: changed since it was listed (image {item.key}); run the same command again")
        return data

    def __enter__(self) -> ItemReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._path = self._file = None
