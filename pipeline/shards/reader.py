"""TODO-DOC pipeline.shards.reader (from pipeline.shards)."""

from __future__ import annotations

import hashlib
import mmap
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np

from pipeline.files import sha256_of
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.shards.format import INDEX, INDEX_DTYPE, SEALED_NS, Manifest, ShardRecord
from pipeline.shards.writer import seal_tar
from pipeline.workers import Progress


class ShardSet:
    """An open shard set. `index` has INDEX_DTYPE; its row number is the sample id."""

    def __init__(self, folder: Path, manifest: Manifest, index: np.ndarray, manifest_sha256: str) -> None:
        self.folder, self.manifest, self.index = folder, manifest, index
        self.manifest_sha256 = manifest_sha256

    def __len__(self) -> int:
        return len(self.index)

    @property
    def tars(self) -> list[Path]:
        """The tars in shard order."""
        return [self.folder / shard.name for shard in self.manifest.shards]

    @cached_property
    def _bytes(self) -> list[np.ndarray]:
        """Every tar memory-mapped, as uint8 vectors. Mapped on first use: a forked or spawned worker maps its own."""
        return [_map(tar) for tar in self.tars]

    def jpegs(self, ids: np.ndarray) -> list[np.ndarray]:
        """The encoded pictures of `ids`: read-only uint8 vectors, views of the memory-mapped tars."""
        tars = self._bytes
        rows = self.index[ids]
        shards, starts, sizes = rows["shard"].tolist(), rows["offset"].tolist(), rows["size"].tolist()
        return [tars[s][o : o + n] for s, o, n in zip(shards, starts, sizes, strict=True)]

    def part(self, ids: np.ndarray) -> ShardSet:
        """A set of these samples only, of the same files; their own ids count from 0."""
        part = copy(self)
        part.index = self.index[ids]
        return part

    def unmap(self) -> None:
        """Lets the mapped tars go; they are mapped again when they are asked for."""
        self.__dict__.pop("_bytes", None)

    def key(self, sample_id: int) -> str:
        """The sample's key, from the tar header that stands before its bytes."""
        row = self.index[sample_id]
        header = bytes(self._bytes[row["shard"]][row["offset"] - tarfile.BLOCKSIZE : row["offset"]])
        return tarfile.TarInfo.frombuf(header, "ascii", "strict").name.removesuffix(".jpg")

    def where(self, sample_id: int) -> str:
        """The sample named for a person: tar, byte offset and key."""
        row = self.index[sample_id]
        return f"{self.manifest.shards[row['shard']].name}:{row['offset']}:{self.key(sample_id)}"


def open_shards(folder: Path, progress: Progress = lambda n: None) -> ShardSet:
    """Opens a shard set and checks it against its manifest.

    A tar is hashed unless its time of change is the one it was sealed with when last hashed, which any write (or a copy
    that does not keep times) takes from it: so a set of 40 GB opens at once. `progress` counts bytes hashed.

    Raises ValueError, naming the file, where the folder is no shard set or does not fit its manifest.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a shard set, which make_shards writes")
    if not path.is_file():
        splits = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        hint = f"did you mean {folder / splits[0]}?" if splits else "make_shards writes it last: run it (again)"
        raise ValueError(f"{folder}: no {MANIFEST} here, so not a shard set; {hint}")
    text = path.read_bytes()
    manifest = Manifest.from_json(text.decode(errors="replace"), path)
    index = read_index(folder, manifest)
    _check_tars(folder, manifest, progress)
    return ShardSet(folder, manifest, index, hashlib.sha256(text).hexdigest())


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """index.npy, checked against the manifest; ValueError where it is missing or changed."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{path}: missing, though {MANIFEST} names it; run make_shards again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise ValueError(f"{path}: its sha256 is not the one in {MANIFEST}; run make_shards again")
    index: np.ndarray = np.load(BytesIO(data))
    assert index.dtype == INDEX_DTYPE and len(index) == manifest.samples
    return index


def rows_by_shard(index: np.ndarray, manifest: Manifest) -> list[np.ndarray]:
    """The index cut into one part per shard, in which order it is written."""
    return np.split(index, np.searchsorted(index["shard"], range(1, len(manifest.shards))))


def _check_tars(folder: Path, manifest: Manifest, progress: Progress) -> None:
    stale: list[ShardRecord] = []
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {MANIFEST} names it; run make_shards again")
        if path.stat().st_size != shard.bytes:
            found = path.stat().st_size
            raise ValueError(f"{path}: {found} bytes, expected {shard.bytes}; it was changed, run make_shards again")
        if path.stat().st_mtime_ns != SEALED_NS:
            stale.append(shard)
    if not stale:
        return
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
        for shard, digest in zip(stale, pool.map(lambda s: sha256_of(folder / s.name), stale), strict=True):
            if digest != shard.sha256:
                raise ValueError(
                    f"{folder / shard.name}: sha256 {digest[:12]}..., expected {shard.sha256[:12]}...;"
                    " it was changed, run make_shards again"
                )
            progress(shard.bytes)
            with suppress(OSError):  # a folder we may not write: the tar is hashed again next time
                seal_tar(folder / shard.name)


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
