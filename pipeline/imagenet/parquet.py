"""ImageNet in parquet files as Hugging Face serves it: a row is a picture. Needs pyarrow, an extra of this package.

In: a folder with train-00000-of-00294.parquet ... and validation-*.parquet, there or in its folder data; `image` is a
struct of bytes and path, `label` an integer. Out: a `Listing`, and `ParquetRows`, which reads a listed picture.

An item's offset is the number of its row, its size that of the whole file: a row's own size is known once it is read.
Rows come in groups that are read as a whole, so neighbours cost one read and pictures here and there a group each.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from pipeline.imagenet.labels import Scan, classes_by_label, listing_of, scan_of
from pipeline.imagenet.listing import Item, Listing, key_of

FILE = re.compile(r"(train|validation|val)-.*\.parquet")
NUMBERED = re.compile(r"-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class HuggingFaceParquet:
    """Parquet files in `root` or `root`/data; files of other splits (test) are ignored."""

    root: Path
    layout: str = "parquet"
    expected: str = "train-*.parquet or validation-*.parquet, there or in data"
    _scans: dict[str, Scan] = field(default_factory=dict, init=False, compare=False, repr=False)

    def splits(self) -> list[str]:
        """The splits that have a file."""
        return [split for split, files in self._files().items() if files]

    def listing(self, split: str) -> Listing:
        """Items by file, then row. Reads names and labels of all splits, since each may tell what a label means."""
        files = self._files()
        names = _class_names([file for s in self.splits() for file in files[s]])
        scans = {s: self._scan(s, files[s]) for s in self.splits()}
        for s, scan in scans.items():
            if names and (unknown := {label for label in scan.labels if int(label) >= len(names)}):
                raise ValueError(f"{files[s][0]}: {s} has label {min(unknown)}, but names for {len(names)} labels only")
        words = {str(label): name for label, name in enumerate(names)}
        return listing_of(self.layout, split, scans[split], classes_by_label(list(scans.values()), words))

    def _scan(self, split: str, files: Sequence[Path]) -> Scan:
        if split not in self._scans:
            _check_whole(files)
            self._scans[split] = scan_of(row for file in files for row in _rows(file))
            if not self._scans[split].labels:
                raise ValueError(f"{files[0]}: no row in it, nor in any other file of {split}; download the set again")
        return self._scans[split]

    def _files(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {"train": [], "val": []}
        for folder in (self.root, self.root / "data"):
            for path in sorted(folder.glob("*.parquet")):
                if match := FILE.fullmatch(path.name):
                    found["train" if match[1] == "train" else "val"].append(path)
            if any(found.values()):
                break
        return found


def _check_whole(files: Sequence[Path]) -> None:
    """ValueError where the names say `-of-00294` and a number is not there."""
    numbers = [NUMBERED.search(path.name) for path in files]
    found, totals = {int(n[1]) for n in numbers if n}, {int(n[2]) for n in numbers if n}
    if totals and (totals != {len(files)} or found != set(range(len(files)))):
        missing = min(set(range(max(totals))) - found, default=None)
        what = f"{missing:05d} is missing" if missing is not None else "they are of two sets"
        raise ValueError(f"{files[0]}: {len(files)} files of its split, expected {max(totals)} ({what}); get them all")


def _open(path: Path) -> Any:
    """The file as a pyarrow ParquetFile; ValueError without pyarrow and for what is no parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; run: pip install 'alexnet-pipeline[parquet]'") from error
    try:
        return parquet.ParquetFile(path)  # not mapped: a file cut short meanwhile would kill the process
    except FileNotFoundError:
        raise
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}); download it again") from error


def _read_group(path: Path, file: Any, group: int, columns: Sequence[str]) -> dict[str, Any]:
    """Leaf -> values (pyarrow, with `to_pylist`) of one row group."""
    from pyarrow import ArrowException

    try:
        table = file.read_row_group(group, columns=list(columns), use_threads=False).flatten()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: row group {group} cannot be read ({error}); download it again") from error
    return {name: table.column(name) for name in columns}


def _class_names(files: Sequence[Path]) -> list[str]:
    """The names of labels 0, 1, ... in the files' metadata, the same in all (else ValueError); empty if it has none."""
    found: list[list[str]] = []
    for path in files:
        with _open(path) as file:
            text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            label = json.loads(text).get("info", {}).get("features", {}).get("label", {})
            found.append([str(name) for name in label["names"]] if label.get("_type") == "ClassLabel" else [])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: its metadata tells no class names ({error!r}); download it again") from error
        if found[-1] != found[0]:
            raise ValueError(f"{path}: names its classes otherwise than {files[0].name}; use files of one set")
    return found[0] if found else []


def _rows(path: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """(key, label, file, row, size of the file) of every row; the pictures themselves are not read."""
    row, size, stem = 0, path.stat().st_size, path.stem.replace(".", "_")
    with _open(path) as file:
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        if not {"image.bytes", "label"} <= set(leaves):
            raise ValueError(f"{path}: columns {', '.join(leaves)}; expected image.bytes, image.path and label")
        columns = [name for name in ("label", "image.path") if name in leaves]
        for group in range(file.num_row_groups):
            values = _read_group(path, file, group, columns)
            labels = values["label"].to_pylist()
            names = values["image.path"].to_pylist() if "image.path" in values else [None] * len(labels)
            for label, name in zip(labels, names, strict=True):
                if not isinstance(label, int) or label < 0:
                    raise ValueError(f"{path}: row {row} has label {label!r}, expected a number from 0")
                yield key_of(name or f"{stem}_{row}"), str(label), path, row, size
                row += 1


class ParquetRows:
    """Reads pictures of one file and keeps the row group of the last, so that in the file's order each is read once."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._group = path, path.stat().st_size, -1
        self._file: Any = None
        self._images: Any = None
        self._ends: list[int] = []  # rows up to the end of each group

    def read(self, item: Item) -> bytes | None:
        """The bytes of row `item.offset`; None where the file is not as long as when it was listed."""
        if item.size != self._size:
            return None
        if self._file is None:
            self._file = _open(self._path)
            footer = self._file.metadata
            self._ends = list(accumulate(footer.row_group(i).num_rows for i in range(footer.num_row_groups)))
        group = bisect_right(self._ends, item.offset)
        if group == len(self._ends):
            return None
        if group != self._group:
            self._images = None  # only one row group in memory
            self._images = _read_group(self._path, self._file, group, ["image.bytes"])["image.bytes"]
            self._group = group
        data: bytes | None = self._images[item.offset - self._ends[group]].as_py()  # counted from the group's end
        if data is None:
            raise ValueError(f"{self._path}: row {item.offset} has no bytes, only a path; embed the pictures")
        return data

    def close(self) -> None:
        """Lets the file go."""
        if self._file is not None:
            self._file.close()
