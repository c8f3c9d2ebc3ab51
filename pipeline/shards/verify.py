"""Whether a shard set is as it was written: every hash, every index row and, if asked, every picture.

`verify` goes on past the first fault and names each one: file, sample (by its key) where one is hit, and the bytes. A
tar whose hash is right needs no closer look. In another, all but the pictures is known from names and sizes, and the
pictures have their checksums in the index: so every byte belongs to something that can be named.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import sha256_of
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.shards.format import INDEX, Manifest, ShardRecord, dali_index, member_header, other_indexes, padded
from pipeline.shards.reader import read_index, rows_by_shard
from pipeline.workers import Workers

DALI_INDEX_SUFFIX = ".idx"


@dataclass(frozen=True)
class Fault:
    """What is wrong: in which file, at which bytes (None: all of it), of which sample (None: of none)."""

    file: str
    what: str
    sample: str | None = None
    start: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        where = self.file if self.start is None else f"{self.file}, bytes {self.start} to {self.end}"
        return f"{where}: {self.what}" if self.sample is None else f"{where}, sample {self.sample}: {self.what}"


def verify(folder: Path, deep: bool, workers: Workers, progress: Callable[[int], None]) -> list[Fault]:
    """The faults of the set in `folder`, none if it is as written; `deep` decodes every picture too.

    A shard is a job of `workers`; `progress` counts samples. Without a readable manifest there is
    nothing to compare with, and that is the one fault.
    """
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_text(errors="replace"), folder / MANIFEST)
    except (OSError, ValueError) as error:
        return [Fault(MANIFEST, f"missing or damaged ({error})")]
    try:
        index = read_index(folder, manifest)
    except ValueError as error:
        return [Fault(INDEX, str(error)), *_wrong_hashes(folder, manifest.shards)]
    faults = list(_wrong_indexes(folder, manifest))
    parts = rows_by_shard(index, manifest)
    results = workers.map(verify_shard, repeat(folder), manifest.shards, parts, repeat(deep))
    for record, found in zip(manifest.shards, results, strict=True):
        faults += found
        progress(record.samples)
    return faults


def _wrong_indexes(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    for name, content in other_indexes(manifest).items():
        if not (folder / name).is_file():
            yield Fault(name, "missing")
        elif (folder / name).read_bytes() != content:
            yield Fault(name, "not what follows from the manifest")


def _wrong_hashes(folder: Path, records: Sequence[ShardRecord]) -> Iterator[Fault]:
    for record in records:
        if not (folder / record.name).is_file():
            yield Fault(record.name, "missing")
        elif sha256_of(folder / record.name) != record.sha256:
            yield Fault(record.name, "its sha256 is not the manifest's")


def verify_shard(folder: Path, record: ShardRecord, rows: np.ndarray, deep: bool) -> list[Fault]:
    """The faults of one tar and its .idx, whose index rows are `rows`."""
    path = folder / record.name
    idx = path.with_suffix(DALI_INDEX_SUFFIX)
    idx_text = idx.read_bytes() if idx.is_file() else b""
    if not path.is_file():
        return [Fault(record.name, "missing")]
    data = path.read_bytes()
    whole = len(data) == record.bytes and hashlib.sha256(data).hexdigest() == record.sha256
    keys = _keys_of_tar(data, rows) if whole else _keys_of_idx(idx_text, len(rows))
    faults: list[Fault] = []
    if not whole:
        faults = list(_differences(record, data, keys, rows)) or [
            Fault(record.name, "its sha256 is not the manifest's")
        ]
    if idx_text != dali_index(keys, rows):
        faults.append(Fault(idx.name, "missing" if not idx.is_file() else "not the index of its tar"))
    if deep and whole:
        faults += _undecodable(record, data, keys, rows)
    return faults


def _keys_of_tar(data: bytes, rows: np.ndarray) -> list[str]:
    headers = (data[offset - tarfile.BLOCKSIZE : offset] for offset in rows["offset"].tolist())
    return [tarfile.TarInfo.frombuf(h, "ascii", "strict").name.removesuffix(".jpg") for h in headers]


def _keys_of_idx(text: bytes, samples: int) -> list[str]:
    """The keys that an .idx names, by place; "?" where it is damaged itself."""
    lines = text.decode(errors="replace").splitlines()[1:]
    keys = [line.split()[3].removesuffix(".jpg") if len(line.split()) == 8 else "?" for line in lines[:samples]]
    return keys + ["?"] * (samples - len(keys))


def _differences(record: ShardRecord, data: bytes, keys: Sequence[str], rows: np.ndarray) -> Iterator[Fault]:
    """Where `data` is not what `rows` say, sample by sample: both headers, the picture, the label, the padding."""
    if len(data) != record.bytes:
        yield Fault(
            record.name, f"{len(data)} bytes, expected {record.bytes}", None, min(len(data), record.bytes), record.bytes
        )
    end = 0
    for key, row in zip(keys, rows, strict=True):
        offset, size, label = int(row["offset"]), int(row["size"]), str(row["label"]).encode()
        jpeg = data[offset : offset + size]
        if zlib.crc32(jpeg) != row["crc32"]:
            yield Fault(record.name, "the picture's bytes changed", key, offset, offset + size)
        start, after = offset - tarfile.BLOCKSIZE, offset + size
        tail = bytes(padded(size) - size) + member_header(f"{key}.cls", len(label)) + label
        tail += bytes(padded(len(label)) - len(label))
        end = after + len(tail)
        known = key != "?"  # else the headers cannot be told from damage; the idx is a fault of its own
        if known and data[start:offset] != member_header(f"{key}.jpg", size):
            yield Fault(record.name, "the header before the picture changed", key, start, offset)
        if known and data[after:end] != tail:
            yield Fault(record.name, "the label or what surrounds it changed", key, after, end)
    if any(data[end:]):
        yield Fault(record.name, "bytes behind the last sample changed", None, end, len(data))


def _undecodable(record: ShardRecord, data: bytes, keys: Sequence[str], rows: np.ndarray) -> Iterator[Fault]:
    for key, row in zip(keys, rows, strict=True):
        offset, end = int(row["offset"]), int(row["offset"] + row["size"])
        try:
            with Image.open(BytesIO(data[offset:end])) as image:
                image.load()
                if image.size != (row["width"], row["height"]) or image.mode != "RGB":
                    yield Fault(record.name, f"{image.mode} of {image.size}, unlike the index", key, offset, end)
        except (OSError, ValueError, SyntaxError) as error:
            yield Fault(record.name, f"cannot be decoded ({error})", key, offset, end)
