"""TODO-DOC pipeline.shards.writer (from pipeline.shards)."""

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

from pipeline.files import published
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.shards.format import (
    INDEX,
    INDEX_DTYPE,
    SEALED_NS,
    Manifest,
    Sample,
    ShardRecord,
    dali_index,
    member_info,
    other_indexes,
)


class _HashingFile:
    """Write-only file that hashes what passes through, so that a tar is hashed without being read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.bytes


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> tuple[ShardRecord, np.ndarray]:
    """Writes `name`.tar and `name`.idx; returns the record and the index rows (INDEX_DTYPE, `shard` left 0).

    Takes samples one at a time, so memory does not grow with the shard.
    """
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    with published(folder / f"{name}.tar") as file:
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for sample in samples:
                offset = _add(tar, f"{sample.key}.jpg", sample.jpeg)
                _add(tar, f"{sample.key}.cls", str(sample.label).encode())
                crc = zlib.crc32(sample.jpeg)
                rows.append((0, offset, len(sample.jpeg), sample.label, sample.width, sample.height, crc))
                keys.append(sample.key)
    seal_tar(folder / f"{name}.tar")
    index = np.array(rows, dtype=INDEX_DTYPE)
    with published(folder / f"{name}.idx") as file:
        file.write(dali_index(keys, index))
    return ShardRecord(f"{name}.tar", len(rows), hashing.bytes, hashing.hash.hexdigest()), index


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member with fixed metadata; returns the offset of its first data byte."""
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member_info(name, len(data)), BytesIO(data))
    return offset


def publish(folder: Path, manifest_of: Callable[[str], Manifest], index: np.ndarray) -> Manifest:
    """Writes index.npy, others' indexes and, last, the manifest, made by `manifest_of(index_sha256)`. Returns it."""
    assert index.dtype == INDEX_DTYPE
    text = BytesIO()
    np.save(text, index)
    with published(folder / INDEX) as file:
        file.write(text.getvalue())
    manifest = manifest_of(hashlib.sha256(text.getvalue()).hexdigest())
    for name, content in other_indexes(manifest).items():
        with published(folder / name) as file:
            file.write(content)
    with published(folder / MANIFEST) as file:
        file.write(manifest.to_json().encode())
    return manifest


def seal_tar(path: Path) -> None:
    """Gives a tar whose hash is known the time of change that any later write takes from it."""
    os.utime(path, ns=(SEALED_NS, SEALED_NS))
