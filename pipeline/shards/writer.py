"""Writes a shard (tar and DALI index) and publishes a shard set (index.npy, other packages' indexes, manifest)."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.files import published, warn_if_unsupported
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.shards.format import (
    DALI_INDEX_SUFFIX,
    HASHED_MTIME_NS,
    INDEX,
    INDEX_DTYPE,
    Manifest,
    Sample,
    ShardRecord,
    dali_index,
    other_indexes,
    tar_member,
)


class _HashingFile:
    """A write-only file that hashes what is written, so that a tar need not be read again for its hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.bytes


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> tuple[ShardRecord, np.ndarray]:
    """Writes `name`.tar and `name`.idx. Takes samples one at a time, so memory use does not grow with the shard.

    Returns:
        The tar's record for the manifest, and its index rows (INDEX_DTYPE) with `shard` still 0.
    """
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    with published(folder / f"{name}.tar") as file:
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for sample in samples:
                offset = _append(tar, f"{sample.key}.jpg", sample.jpeg)
                _append(tar, f"{sample.key}.cls", str(sample.label).encode())
                crc = zlib.crc32(sample.jpeg)
                rows.append((0, offset, len(sample.jpeg), sample.label, sample.width, sample.height, crc))
                keys.append(sample.key)
    mark_hashed(folder / f"{name}.tar")
    index = np.array(rows, dtype=INDEX_DTYPE)
    with published(folder / f"{name}{DALI_INDEX_SUFFIX}") as file:
        file.write(dali_index(keys, index))
    return ShardRecord(f"{name}.tar", len(rows), hashing.bytes, hashing.hash.hexdigest()), index


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member with fixed metadata; returns the offset of its first data byte."""
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(tar_member(name, len(data)), BytesIO(data))
    return offset


def publish(folder: Path, manifest_of: Callable[[str], Manifest], index: np.ndarray) -> Manifest:
    """Turns a folder of shards into a shard set: writes index.npy, other packages' indexes and, last, the manifest.

    Args:
        folder: Holds the tars and their DALI indexes already.
        manifest_of: Makes the manifest from the SHA-256 of index.npy.
        index: Rows of all samples (INDEX_DTYPE), `shard` filled in.
    """
    assert index.dtype == INDEX_DTYPE
    npy = BytesIO()
    np.save(npy, index)
    with published(folder / INDEX) as file:
        file.write(npy.getvalue())
    manifest = manifest_of(hashlib.sha256(npy.getvalue()).hexdigest())
    for name, content in other_indexes(manifest).items():
        with published(folder / name) as file:
            file.write(content)
    with published(folder / MANIFEST) as file:
        file.write(manifest.to_json().encode())
    return manifest


def mark_hashed(tar: Path, warn: bool = True) -> None:
    """Sets the modification time that means "this tar's hash is known to be right".

    Any later write changes the modification time, and so does a copy that does not preserve times. `open_shards`
    therefore hashes only tars with another time, and opens 40 GB of unchanged tars at once.
    """
    try:
        os.utime(tar, ns=(HASHED_MTIME_NS, HASHED_MTIME_NS))
    except OSError as error:
        if not warn:  # a reader that may not write here: the tar is hashed again next time
            return
        warn_if_unsupported(error, tar.parent, "set modification times", "tars are hashed each time the set is opened")
