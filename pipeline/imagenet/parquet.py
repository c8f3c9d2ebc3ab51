"""ImageNet in parquet files as Hugging Face distributes it, one image per row: the layout `parquet`.

    train-00000-of-00294.parquet ..., validation-*.parquet        in the folder or in its subfolder data
    train.parquet, train/0000.parquet                             or one file, or files in folders of splits

The image column is a struct of bytes and path or holds the bytes; the label column holds integers or names. Columns are
found by type and name (parquet_columns.py). This layout requires pyarrow, an optional dependency of this project.

In: the files. Out: a `Part`, and `ParquetRows`, which reads a listed image. An item's offset is its row number, plus
the image column if the user named it. Its size is that of the whole file, because the size of a row is only known once
the row is read. Parquet reads a whole row group at a time, so neighbouring rows take one read, but scattered rows take
one read of a group each: `row_images` streams many rows out of the file with one read of each group.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from pipeline.imagenet.entries import remedy
from pipeline.imagenet.labels import LabelledImage, Scan, classes_by_label, outlying_labels, scan_of
from pipeline.imagenet.listing import ClassName, Item
from pipeline.imagenet.parquet_columns import Columns, choose_columns, flat_columns, label_text
from pipeline.imagenet.parts import Part, check_complete, counted, split_in_file, without_numbers

EXPECTED = "train-*.parquet or validation-*.parquet, there or in data"
COLUMN_SHIFT = 40  # an item's offset is the row + (number of the image column + 1 if the user named it) << COLUMN_SHIFT
ROW_MASK = (1 << COLUMN_SHIFT) - 1


STREAM_BUFFER, ROWS_PER_READ = 1 << 20, 16  # bytes and rows that are read at a time from a stream


@dataclass(frozen=True)
class ColumnNames:
    """The columns that the user named; None finds them."""

    image: str | None = None
    label: str | None = None


def parquet_parts(split: str, files: Sequence[Path], where: str, names: ColumnNames) -> Part | None:
    """The part for a split's parquet files. None if there is no file."""
    if not files:
        return None
    count = counted(len(files), "parquet file") + without_numbers(files)
    what = f"{files[0].name if len(files) == 1 else count} in {where}"
    return Part("parquet", split, what, tuple(files), lambda: _scan(split, files, names), _classes)


def parquet_split(name: str) -> str | None:
    """The split of a parquet file by its name; None without one, or for a split such as test."""
    split = split_in_file(name)
    return split if split in ("train", "val") else None


def _classes(split: str, parts: Mapping[str, Part], scans: Mapping[str, Scan]) -> Mapping[str, ClassName]:
    """The class of each label, by the names in the files' metadata or the labels themselves.

    Names and labels of all splits are read, since only together they tell what a label means.
    """
    names = _class_names([file for part in parts.values() for file in part.uses])
    words = {str(label): name for label, name in enumerate(names)}
    if names and not any(label.isdecimal() for scan in scans.values() for label in scan.labels):
        words = {name: name for name in names}
    return classes_by_label(scans.values(), words or outlying_labels(scans.values()))


def _scan(split: str, files: Sequence[Path], names: ColumnNames) -> Scan:
    check_complete(files)
    scan = scan_of(image for file in files for image in _images(file, names))
    if not len(scan.items):
        raise ValueError(f"{files[0]}: no row in it, nor in any other file of {split}; download the set again")
    return scan


def _open(path: Path, stream: bool = False) -> Any:
    """The file as a pyarrow ParquetFile, which reads whole row groups or, as a stream, page by page.

    Raises:
        ValueError: pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; run: pip install 'alexnet-pipeline[parquet]'") from error
    try:
        # Not memory-mapped: a file that gets shorter would kill the process.
        return parquet.ParquetFile(path, buffer_size=STREAM_BUFFER if stream else 0, pre_buffer=not stream)
    except (FileNotFoundError, PermissionError) as error:  # pyarrow's own errors have no file name
        raise type(error)(error.errno, f"cannot read: {os.strerror(error.errno or 0)}", str(path)) from error
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}); {remedy(path)}") from error


def _read_group(path: Path, file: Any, group: int, columns: Sequence[str]) -> dict[str, Any]:
    """Column (`image.bytes` for a field of a struct) -> values of one row group, as pyarrow arrays."""
    from pyarrow import ArrowException

    try:
        table = file.read_row_group(group, columns=list(columns), use_threads=False).flatten()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: row group {group} cannot be read ({error}); download it again") from error
    return {name: table.column(name) for name in columns}


def is_parquet(name: str) -> bool:
    """Whether a file is parquet by its name."""
    return name.lower().endswith(".parquet")


def row_group_sizes(path: Path) -> list[tuple[int, int]]:
    """For each row group of a file, the number of its rows and of its uncompressed bytes."""
    with _open(path) as file:
        footer = file.metadata
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def row_images(
    path: Path, groups: Sequence[int], column: int, first_row: int, wanted: Set[int]
) -> Iterator[tuple[int, bytes]]:
    """Streams images out of row groups, in the file's order. At most two data pages of the column are in memory.

    Args:
        path: The file.
        groups: Consecutive row groups.
        column: The image column, as in an item's offset above COLUMN_SHIFT.
        first_row: Number of the first row of `groups` in the file.
        wanted: The rows whose images are given; all are in `groups`.

    Yields:
        (row, the bytes of its image, empty without an image), by row.
    """
    from pyarrow import ArrowException, Table

    with _open(path, stream=True) as file:
        name = _image_column(path, file.schema_arrow, column)
        try:
            for batch in file.iter_batches(ROWS_PER_READ, list(groups), [name], use_threads=False):
                images = Table.from_batches([batch]).flatten().column(name)
                for row in range(first_row, first_row + len(images)):
                    if row in wanted:
                        yield row, images[row - first_row].as_py() or b""
                first_row += len(images)
        except (ArrowException, OSError) as error:
            raise ValueError(
                f"{path}: row groups {groups[0]} to {groups[-1]} cannot be read ({error}); download it again"
            ) from error


def _image_column(path: Path, schema: Any, column: int) -> str:
    """The name of the image column that an item's offset means."""
    return flat_columns(schema)[column - 1] if column else choose_columns(path, schema).image


def _class_names(files: Sequence[Path]) -> list[str]:
    """The names of labels 0, 1, ... in the files' metadata; empty without them. ValueError if the files differ."""
    found: list[list[str]] = []
    for path in files:
        with _open(path) as file:
            text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            features = json.loads(text).get("info", {}).get("features", {})
            named = [f for f in features.values() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
            label = features["label"] if features.get("label") in named else named[0] if len(named) == 1 else None
            found.append([str(name) for name in label["names"]] if label else [])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no class names in its metadata ({error!r}); download it again") from error
        if found[-1] and found[-1] != next(filter(None, found)):
            first = next(file for file, names in zip(files, found, strict=False) if names)
            raise ValueError(f"{path}: its class names differ from those of {first.name}; use files of one set")
    return next(filter(None, found), [])


def _images(path: Path, names: ColumnNames) -> Iterator[LabelledImage]:
    """The image of every row. Its bytes are not read."""
    row, file_size, stem = 0, path.stat().st_size, path.stem.replace(".", "_")
    with _open(path) as file:
        columns = choose_columns(path, file.schema_arrow, names.image, names.label)
        _check_embedded(path, file, columns)
        base = 0 if names.image is None else (flat_columns(file.schema_arrow).index(columns.image) + 1) << COLUMN_SHIFT
        for group in range(file.num_row_groups):
            values = _read_group(path, file, group, [c for c in (columns.label, columns.path) if c])
            labels = values[columns.label].to_pylist()
            paths = values[columns.path].to_pylist() if columns.path else [None] * len(labels)
            for label, name in zip(labels, paths, strict=True):
                text = label_text(label)
                problem = "" if text else f"row {row} has label {label!r}, expected a number from 0 or a name"
                yield LabelledImage(name or f"{stem}_{row}", text, path, base + row, file_size, problem)
                row += 1


def _check_embedded(path: Path, file: Any, columns: Columns) -> None:
    """Raises ValueError if the file's statistics say that no row has image bytes."""
    footer = file.metadata
    number = [file.schema.column(i).path for i in range(len(file.schema))].index(columns.image)
    groups = [footer.row_group(i).column(number) for i in range(footer.num_row_groups)]
    statistics = [group.statistics for group in groups]
    if not footer.num_rows or not all(s is not None and s.has_null_count for s in statistics):
        return
    if sum(s.null_count for s in statistics) == footer.num_rows:
        raise ValueError(f"{path}: no row has image bytes, only a path; use files with embedded images")


class ParquetRows:
    """Reads images of one file.

    It keeps the row group of the last image, so that reading in the file's order reads each group once.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file_size, self._group = path, path.stat().st_size, -1
        self._file: Any = None
        self._images: Any = None  # image column of the row group `_group`
        self._column = ""
        self._group_ends: list[int] = []  # for each group, the number of rows up to its end

    def read(self, item: Item) -> bytes | None:
        """The bytes of the item's row, empty without an image; None if the file has another size than when listed."""
        if item.size != self._file_size:
            return None
        column, row = item.offset >> COLUMN_SHIFT, item.offset & ROW_MASK
        if self._file is None:
            self._file = _open(self._path)
            footer = self._file.metadata
            self._group_ends = list(accumulate(footer.row_group(i).num_rows for i in range(footer.num_row_groups)))
            self._column = _image_column(self._path, self._file.schema_arrow, column)
        group = bisect_right(self._group_ends, row)
        if group == len(self._group_ends):
            return None
        if group != self._group:
            self._images = None  # frees the last group first: only one is in memory at a time
            self._images = _read_group(self._path, self._file, group, [self._column])[self._column]
            self._group = group
        # The index is negative: it counts from the end of the group.
        data: bytes | None = self._images[row - self._group_ends[group]].as_py()
        return data or b""

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
