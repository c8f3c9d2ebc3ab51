"""Reads each parquet row group once: unpacks the images into files from which any image takes one read.

A parquet file is read in row groups, and a shard needs images from all of them, because the order of samples is drawn
from the seed. So shards that read the parquet files themselves would read each row group many times. Before two or more
shards are written, `unpacked` reads the row groups in file order and writes the images to temporary files in the work
folder, which take as much space as the images. An interrupted run keeps these files and the next run uses them.

In: jobs. Out: the same jobs with `ShardJob.unpacked`. In memory are at most two data pages of each parquet file that is
being read, whatever the size of its row groups.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.files import published, remove_temporary
from pipeline.imagenet.listing import Items
from pipeline.imagenet.parquet import COLUMN_SHIFT, ROW_MASK, is_parquet, row_group_sizes, row_images
from pipeline.shards.bottleneck import StageSeconds
from pipeline.shards.job import ShardJob, read_journal_entry
from pipeline.workers import Workers

FOLDER = "row_groups"  # in the work folder
UNIT_BYTES = 1 << 28  # row groups of about this size are one job
HEADER = b"unpacked"  # so that no image begins at byte 0, which means "the whole file"


@dataclass(frozen=True, eq=False)
class Unit:
    """Consecutive row groups of one parquet file, unpacked by one job.

    Attributes:
        source: The parquet file.
        column: Which image column, as in an item's offset above COLUMN_SHIFT.
        groups: Numbers of the row groups.
        first_row: Number of the first row of these groups in the file.
        rows: (n,) The rows that shards need, ascending.
        target: The file for their images.
        size: About how many bytes that takes.
    """

    source: Path
    column: int
    groups: tuple[int, ...]
    first_row: int
    rows: NDArray[np.int64]
    target: Path
    size: float


@contextmanager
def unpacked(
    jobs: Iterable[ShardJob], work: Path, workers: Workers, part: str = ""
) -> Iterator[tuple[Iterable[ShardJob], StageSeconds]]:
    """Gives the jobs, with the images of parquet files unpacked if two or more jobs are left to do.

    Args:
        jobs: All jobs of a split, or those of one part.
        work: The work folder.
        workers: What unpacks; each unit is one job.
        part: Name of the part, if `jobs` are not all. Parts run at the same time, so each has files of its own.

    Yields:
        The jobs, and the seconds that workers spent on unpacking. The files are removed when the block ends well;
        those of a part when the set is published, because the same part may run twice.

    Raises:
        ValueError: The disk has too little space for the files, or a parquet file is damaged or has changed.
    """
    jobs = iter(jobs)
    first = next(jobs, None)
    if first is None or not is_parquet(os.fsdecode(first.items.name[0])):
        yield ([] if first is None else chain([first], jobs)), StageSeconds()
        return
    every = [first, *jobs]
    left = [job for job in every if read_journal_entry(job) is None]
    folder = work / f"{FOLDER}{part}"
    done, spent = _unpack_all(left, folder, workers) if len(left) > 1 else (left, StageSeconds())
    by_name = {job.name: job for job in done}
    yield [by_name.get(job.name, job) for job in every], spent
    if not part:
        remove_unpacked(work)


def remove_unpacked(work: Path) -> None:
    """Removes the files of `unpacked`, also those of parts."""
    for folder in work.glob(f"{FOLDER}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _unpack_all(jobs: Sequence[ShardJob], folder: Path, workers: Workers) -> tuple[list[ShardJob], StageSeconds]:
    """The jobs with `unpacked` set, and the time that workers spent."""
    files, file, offset = _places(jobs)
    units = list(_units(files, file, offset, folder))
    _check_space(units, folder)
    folder.mkdir(exist_ok=True)
    remove_temporary(folder)
    names = np.array([unit.target.name for unit in units], "S")
    name, start, size = np.empty(len(file), names.dtype), np.empty(len(file), np.int64), np.empty(len(file), np.int64)
    position = {unit.target: number for number, unit in enumerate(units)}
    spent_s = 0.0
    for target, starts, sizes, seconds in workers.as_done(unpack, units):
        number = position[target]
        spent_s += seconds
        chosen = np.flatnonzero(_in_unit(units[number], files, file, offset))
        at = np.searchsorted(units[number].rows, offset[chosen] & ROW_MASK)
        name[chosen], start[chosen], size[chosen] = names[number], starts[at], sizes[at]
    ends = np.cumsum([len(job.items) for job in jobs])
    done = []
    for job, end in zip(jobs, ends.tolist(), strict=True):
        rows = slice(end - len(job.items), end)
        parent = np.zeros(len(job.items), np.int32)
        items = job.items
        moved = Items((str(folder),), parent, name[rows].copy(), items.key, items.label, start[rows], size[rows])
        done.append(replace(job, unpacked=moved))
    return done, StageSeconds(row_groups_s=spent_s)


def _places(jobs: Sequence[ShardJob]) -> tuple[list[Path], NDArray[np.int32], NDArray[np.int64]]:
    """The files that the jobs read; for each item of all jobs in sequence, the position of its file, and its offset."""
    number: dict[Path, int] = {}
    columns = []
    for job in jobs:
        items = job.items
        pairs = np.rec.fromarrays([items.parent, items.name])
        _, rows, which = np.unique(pairs, return_index=True, return_inverse=True)
        one_of_each = [items[row] for row in rows.tolist()]
        for item in one_of_each:
            if item.file not in number and item.file.stat().st_size != item.size:
                raise ValueError(f"{item.file}: changed since it was listed; run the same command again")
        paths = [item.file for item in one_of_each]
        columns.append(np.array([number.setdefault(path, len(number)) for path in paths], np.int32)[which])
    return list(number), np.concatenate(columns), np.concatenate([job.items.offset for job in jobs])


def _units(files: Sequence[Path], file: NDArray[np.int32], offset: NDArray[np.int64], folder: Path) -> Iterator[Unit]:
    """The units of all files, in the order of the files' names."""
    by_file = np.argsort(file, kind="stable")
    bounds = np.searchsorted(file[by_file], range(len(files) + 1))
    for number in sorted(range(len(files)), key=lambda n: files[n]):
        path, needed = files[number], np.sort(offset[by_file[bounds[number] : bounds[number + 1]]])
        column, rows = int(needed[0]) >> COLUMN_SHIFT, needed & ROW_MASK
        groups: list[int] = []
        first = end = held = 0
        sizes = row_group_sizes(path)
        for group, (count, size) in enumerate(sizes):
            groups, end, held = [*groups, group], end + count, held + size
            if held >= UNIT_BYTES or group == len(sizes) - 1:
                inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)]
                if len(inside):
                    target = folder / _name(path, column, groups)
                    yield Unit(path, column, tuple(groups), first, inside, target, held * len(inside) / (end - first))
                groups, first, held = [], end, 0


def _name(source: Path, column: int, groups: Sequence[int]) -> str:
    """The name of a unit's file. It changes with the parquet file, so that a changed one is unpacked again."""
    found = source.stat()
    text = repr((str(source), found.st_size, found.st_mtime_ns, column, groups[0], groups[-1]))
    return f"{sha256(text.encode(errors='surrogateescape')).hexdigest()[:24]}.images"


def _in_unit(
    unit: Unit, files: Sequence[Path], file: NDArray[np.int32], offset: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which of all items are in a unit."""
    rows = offset & ROW_MASK
    inside: NDArray[np.bool_] = (file == files.index(unit.source)) & (rows >= unit.rows[0]) & (rows <= unit.rows[-1])
    return inside


def _check_space(units: Sequence[Unit], folder: Path) -> None:
    """Raises ValueError if the disk is too small for the files that are not there yet. Says what is unpacked."""
    needed = sum(unit.size for unit in units if not unit.target.exists())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise ValueError(
            f"{folder}: unpacking the parquet files takes {needed / 1e9:,.1f} GB there until the set is made, and"
            f" {free / 1e9:,.1f} GB are free; free some space, or choose an OUT on a larger disk"
        )
    groups, files = sum(len(unit.groups) for unit in units), len({unit.source for unit in units})
    print(
        f"unpacking {groups:,} row groups of {files:,} parquet files, {needed / 1e9:,.1f} GB, into {folder}",
        file=sys.stderr,
    )


def unpack(unit: Unit) -> tuple[Path, NDArray[np.int64], NDArray[np.int64], float]:
    """Writes the images of a unit to its file, unless an earlier run did. Runs in a worker.

    Returns:
        The unit's file; for each of its rows the first byte and the number of bytes there; the seconds that it took.
    """
    started_s = time.perf_counter()
    table = unit.target.with_suffix(".npy")  # (rows, first bytes, sizes); written last
    if unit.target.is_file() and table.is_file():
        rows, starts, sizes = np.load(table)
        if np.isin(unit.rows, rows).all():
            at = np.searchsorted(rows, unit.rows)
            return unit.target, starts[at], sizes[at], time.perf_counter() - started_s
    found = np.zeros((3, len(unit.rows)), np.int64)
    found[0] = unit.rows
    with published(unit.target) as file:
        position = file.write(HEADER)
        wanted = set(unit.rows.tolist())
        images = (data for row, data in row_images(unit.source, unit.groups, unit.column, unit.first_row, wanted))
        for number, data in enumerate(images):
            found[1:, number] = position, file.write(data)
            position += len(data)
    with published(table) as file:
        np.save(file, found)
    return unit.target, found[1], found[2], time.perf_counter() - started_s
