"""ImageNet in parquet files as Hugging Face distributes it, one image per row: the layout `parquet`.

    train-00000-of-00294.parquet ..., validation-*.parquet        in the folder or in its subfolder data

Column `image` is a struct of bytes and path, column `label` an integer. This layout requires pyarrow, an optional
dependency of this project.

In: the folder. Out: a `Listing`, and `ParquetRows`, which reads a listed image. An item's offset is its row number. Its
size is that of the whole file, because the size of a row is only known once the row is read. Parquet reads a whole row
group at a time, so neighbouring rows take one read, but scattered rows take one read of a group each.
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

from pipeline.imagenet.labels import LabelledImage, Scan, classes_by_label, listing_of, scan_of
from pipeline.imagenet.listing import Item, Listing, key_of

FILE = re.compile(r"(train|validation|val)-.*\.parquet")
NUMBERED = re.compile(r"-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class HuggingFaceParquet:
    """A `Source` with parquet files in `root` or `root`/data. Files of other splits (test) are ignored."""

    root: Path
    layout: str = "parquet"
    expected: str = "train-*.parquet or validation-*.parquet, there or in data"
    _scans: dict[str, Scan] = field(default_factory=dict, init=False, compare=False, repr=False)

    def splits(self) -> list[str]:
        """The splits that have a file."""
        return [split for split, files in self._files().items() if files]

    def listing(self, split: str) -> Listing:
        """Items by file, then row.

        Names and labels of all splits are read, since only together they tell what a label means.
        """
        files = self._files()
        names = _class_names([file for s in self.splits() for file in files[s]])
        scans = {s: self._scan(s, files[s]) for s in self.splits()}
        for s, scan in scans.items():
            if names and (unknown := {label for label in scan.labels if int(label) >= len(names)}):
                raise ValueError(
                    f"{files[s][0]}: {s} has label {min(unknown)}, but the metadata names only {len(names)} classes;"
                    " use files of one set"
                )
        words = {str(label): name for label, name in enumerate(names)}
        return listing_of(self.layout, split, scans[split], classes_by_label(list(scans.values()), words))

    def _scan(self, split: str, files: Sequence[Path]) -> Scan:
        if split not in self._scans:
            _check_whole(files)
            self._scans[split] = scan_of(image for file in files for image in _images(file))
            if not self._scans[split].labels:
                raise ValueError(f"{files[0]}: no row in it, nor in any other file of {split}; download the set again")
        return self._scans[split]

    def _files(self) -> dict[str, list[Path]]:
        """Split -> its files, sorted."""
        found: dict[str, list[Path]] = {"train": [], "val": []}
        for folder in (self.root, self.root / "data"):
            for path in sorted(folder.glob("*.parquet")):
                if match := FILE.fullmatch(path.name):
                    found["train" if match[1] == "train" else "val"].append(path)
            if any(found.values()):
                break
        return found


def _check_whole(files: Sequence[Path]) -> None:
    """Raises ValueError if the names say `-of-00294` and not exactly 294 numbers are there."""
    numbers = [NUMBERED.search(path.name) for path in files]
    found, totals = {int(n[1]) for n in numbers if n}, {int(n[2]) for n in numbers if n}
    if totals and (totals != {len(files)} or found != set(range(len(files)))):
        missing = min(set(range(max(totals))) - found, default=None)
        what = f"{missing:05d} is missing" if missing is not None else "they belong to different sets"
        raise ValueError(
            f"{files[0]}: {len(files)} files in its split, expected {max(totals)} ({what}); download them all"
        )


def _open(path: Path) -> Any:
    """The file as a pyarrow ParquetFile. ValueError if pyarrow is not installed or the file is damaged."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; run: pip install 'alexnet-pipeline[parquet]'") from error
    try:
        return parquet.ParquetFile(path)  # not memory-mapped: a file that gets shorter would kill the process
    except FileNotFoundError:
        raise
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}); download it again") from error


def _read_group(path: Path, file: Any, group: int, columns: Sequence[str]) -> dict[str, Any]:
    """Column (`image.bytes` for a field of a struct) -> values of one row group, as pyarrow arrays."""
    from pyarrow import ArrowException

    try:
        table = file.read_row_group(group, columns=list(columns), use_threads=False).flatten()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: row group {group} cannot be read ({error}); download it again") from error
    return {name: table.column(name) for name in columns}


def _class_names(files: Sequence[Path]) -> list[str]:
    """The names of labels 0, 1, ... in the files' metadata; empty without them. ValueError if the files differ."""
    found: list[list[str]] = []
    for path in files:
        with _open(path) as file:
            text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            label = json.loads(text).get("info", {}).get("features", {}).get("label", {})
            found.append([str(name) for name in label["names"]] if label.get("_type") == "ClassLabel" else [])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no class names in its metadata ({error!r}); download it again") from error
        if found[-1] != found[0]:
            raise ValueError(f"{path}: its class names differ from those of {files[0].name}; use files of one set")
    return found[0] if found else []


def _images(path: Path) -> Iterator[LabelledImage]:
    """The image of every row. Its bytes are not read."""
    row, file_size, stem = 0, path.stat().st_size, path.stem.replace(".", "_")
    with _open(path) as file:
        available = [file.schema.column(i).path for i in range(len(file.schema))]
        if not {"image.bytes", "label"} <= set(available):
            raise ValueError(
                f"{path}: columns {', '.join(available)}; expected image.bytes, image.path and label; use files of"
                " ImageNet"
            )
        columns = [name for name in ("label", "image.path") if name in available]
        for group in range(file.num_row_groups):
            values = _read_group(path, file, group, columns)
            labels = values["label"].to_pylist()
            names = values["image.path"].to_pylist() if "image.path" in values else [None] * len(labels)
            for label, name in zip(labels, names, strict=True):
                if not isinstance(label, int) or label < 0:
                    raise ValueError(
                        f"{path}: row {row} has label {label!r}, expected a number from 0; download the file again"
                    )
                yield LabelledImage(key_of(name or f"{stem}_{row}"), str(label), path, row, file_size)
                row += 1


class ParquetRows:
    """Reads images of one file.

    It keeps the row group of the last image, so that reading in the file's order reads each group once.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file_size, self._group = path, path.stat().st_size, -1
        self._file: Any = None
        self._images: Any = None  # column `image.bytes` of the row group `_group`
        self._group_ends: list[int] = []  # for each group, the number of rows up to its end

    def read(self, item: Item) -> bytes | None:
        """The bytes of row `item.offset`; None if the size of the file has changed since it was listed."""
        if item.size != self._file_size:
            return None
        if self._file is None:
            self._file = _open(self._path)
            footer = self._file.metadata
            self._group_ends = list(accumulate(footer.row_group(i).num_rows for i in range(footer.num_row_groups)))
        group = bisect_right(self._group_ends, item.offset)
        if group == len(self._group_ends):
            return None
        if group != self._group:
            self._images = None  # frees the last group first: only one is in memory at a time
            self._images = _read_group(self._path, self._file, group, ["image.bytes"])["image.bytes"]
            self._group = group
        # The index is negative: it counts from the end of the group.
        data: bytes | None = self._images[item.offset - self._group_ends[group]].as_py()
        if data is None:
            raise ValueError(
                f"{self._path}: row {item.offset} has no image bytes, only a path; use files with embedded images"
            )
        return data

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
