"""The shard format: write a shard, publish a set, open and check a set, read a sample.

A shard set is one folder per split; the same input gives the same bytes:

    train-000000.tar ...   USTAR; members KEY.jpg and KEY.cls (the class index in ASCII); mtime and owner 0
    train-000000.idx ...   DALI's index v1.2, for fn.readers.webdataset
    index.npy              INDEX_DTYPE, one row per sample; the row number is the sample id
    wids.json, _info.json  which tars there are and how many samples each has, as the wids package and timm read it
    manifest.json          what is in the set and what made it, with the hash of every file; written last

A folder without a manifest is not a shard set. Files get their final names only when whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np

FORMAT = "alexnet-pipeline shards, version 3"
MANIFEST = "manifest.json"
INDEX = "index.npy"
WIDS_INDEX = "wids.json"  # wids.ShardListDataset(".../wids.json")
TIMM_INFO = "_info.json"  # timm.create_dataset("wds/", root=".../train", split="train")
SEALED_NS = 1_348_963_200 * 10**9  # 30 September 2012: the time of change of a tar that is as it was when hashed
TEMPORARY = ".tmp"
KEY_LIMIT = 90
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<i4"),  # position in the manifest's `shards`
        ("offset", "<i8"),  # of the JPEG's first byte in the tar
        ("size", "<i4"),  # of the JPEG, bytes
        ("label", "<i4"),  # class index: position of the wnid in sorted order
        ("width", "<u2"),  # pixels
        ("height", "<u2"),
        ("crc32", "<u4"),  # of the JPEG, so that verify can name the sample that a fault is in
    ]
)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """One stored picture: `key` names it in the tar, `jpeg` is a baseline JPEG of `width` x `height` pixels."""

    key: str
    label: int
    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class ClassName:
    """A class: WordNet id (or folder name) and its words."""

    wnid: str
    words: str


@dataclass(frozen=True)
class ShardRecord:
    """A written tar as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Quarantined:
    """A picture of the source that is not in the set, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `settings` and `source` are free-form records of what made the set and from what."""

    split: str
    samples: int
    classes: tuple[ClassName, ...]
    shards: tuple[ShardRecord, ...]
    index_sha256: str
    settings: dict[str, Any]
    source: dict[str, Any]
    quarantined: tuple[Quarantined, ...]

    def to_json(self) -> str:
        """The file's text, the same for equal manifests; its last field is the hash of the others."""
        fields = {"format": FORMAT, **asdict(self)}
        return json.dumps({**fields, "sha256": _json_sha256(fields)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Reads `to_json`'s text; ValueError names `path` if it is something else."""
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            if fields.pop("sha256") != _json_sha256({"format": FORMAT, **fields}):
                raise ValueError("its text is not the one that its own sha256 was taken of")
            fields["classes"] = tuple(ClassName(**entry) for entry in fields["classes"])
            fields["shards"] = tuple(ShardRecord(**entry) for entry in fields["shards"])
            fields["quarantined"] = tuple(Quarantined(**entry) for entry in fields["quarantined"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a shard set's manifest ({error}); run make_shards into a new folder"
            ) from error


def _json_sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


# ---- writing ----------------------------------------------------------------------------------------------------


@contextmanager
def published(path: Path) -> Iterator[IO[bytes]]:
    """A file for writing that appears under `path` only when the block ends well: temporary name, fsync, rename, fsync
    of the folder. The temporary name is nobody else's, so two who write the same file do not meet. OSErrors name it."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # as where the folder itself is gone
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_temporary(folder: Path) -> None:
    """Removes what killed writers left; nobody may be writing there."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


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
    _seal(folder / f"{name}.tar")
    index = np.array(rows, dtype=INDEX_DTYPE)
    with published(folder / f"{name}.idx") as file:
        file.write(dali_index(keys, index))
    return ShardRecord(f"{name}.tar", len(rows), hashing.bytes, hashing.hash.hexdigest()), index


def dali_index(keys: Sequence[str], rows: np.ndarray) -> bytes:
    """The text of DALI's index v1.2 for a tar that holds the samples `keys` at `rows` (INDEX_DTYPE)."""
    lines = [f"v1.2 {len(keys)}\n"]
    for key, offset, size, label in zip(keys, rows["offset"], rows["size"], rows["label"], strict=True):
        label_offset = offset + padded(size) + tarfile.BLOCKSIZE
        lines.append(f"jpg {offset} {size} {key}.jpg cls {label_offset} {len(str(label))} {key}.cls\n")
    return "".join(lines).encode()


def padded(size: int) -> int:
    """The room that `size` bytes take in a tar: whole blocks of 512."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's data."""
    return _tar_info(name, size).tobuf(tarfile.USTAR_FORMAT)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member with fixed metadata; returns the offset of its first data byte."""
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(_tar_info(name, len(data)), BytesIO(data))
    return offset


def _tar_info(name: str, size: int) -> tarfile.TarInfo:
    assert len(name) <= 100 and " " not in name, name
    info = tarfile.TarInfo(name)  # mtime, uid, gid are 0 unless set
    info.size, info.mode = size, 0o644
    return info


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


def other_indexes(manifest: Manifest) -> dict[str, bytes]:
    """Name and content of the indexes that other readers want, which follow from the manifest."""
    shards = manifest.shards
    wids = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": manifest.split,
        "shardlist": [{"url": s.name, "nsamples": s.samples, "filesize": s.bytes} for s in shards],
    }
    split = {
        "name": manifest.split,
        "filenames": [shard.name for shard in shards],
        "shard_lengths": [shard.samples for shard in shards],
        "num_samples": manifest.samples,
    }
    contents = {WIDS_INDEX: wids, TIMM_INFO: {"splits": {manifest.split: split}}}
    return {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in contents.items()}


def fsync_folder(folder: Path) -> None:
    """Has the disk keep the names in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ----------------------------------------------------------------------------------------------------


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
                _seal(folder / shard.name)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(path: Path) -> None:
    """Gives a tar whose hash is known the time of change that any later write takes from it."""
    os.utime(path, ns=(SEALED_NS, SEALED_NS))


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
