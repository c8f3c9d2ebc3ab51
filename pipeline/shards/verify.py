"""Verifies that a shard set is as it was written: every hash, every index row and, on request, every image.

`verify` reports every fault, not only the first: the file, the bytes, and the sample (by key) if a sample is damaged. A
tar with the right hash needs no closer look. In any other tar, the expected bytes of headers, labels and padding follow
from the keys and sizes, and the index has a checksum of every image. So every damaged byte can be attributed.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import doing, sha256_of
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.shards.format import (
    DALI_INDEX_SUFFIX,
    INDEX,
    ORIGINALS,
    Manifest,
    OtherVersion,
    ShardRecord,
    dali_index,
    other_indexes,
    padded_to_blocks,
    tar_header,
)
from pipeline.shards.reader import read_index, rows_by_shard
from pipeline.workers import ProgressCallback, Workers

UNKNOWN_KEY = "?"  # of a sample whose key cannot be told because the tar and its DALI index are both damaged


@dataclass(frozen=True)
class Fault:
    """A fault of a shard set.

    Attributes:
        file: Name of the file.
        what: What is wrong with it.
        sample: Key of the damaged sample; None if no single sample is damaged.
        start: First damaged byte; None for the whole file.
        end: Byte behind the last damaged one.
    """

    file: str
    what: str
    sample: str | None = None
    start: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        where = self.file if self.start is None else f"{self.file}, bytes {self.start} to {self.end}"
        return f"{where}: {self.what}" if self.sample is None else f"{where}, sample {self.sample}: {self.what}"


def verify(folder: Path, deep: bool, workers: Workers, progress: ProgressCallback) -> list[Fault]:
    """Finds all faults of the shard set in `folder`.

    Args:
        folder: One split's folder.
        deep: Also decode every image.
        workers: Each shard is one job.
        progress: Called with the number of samples verified.

    Returns:
        All faults; an empty list if the set is as it was written. Without a readable manifest there is nothing to
        compare with, and the list holds that one fault.
    """
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_text(errors="replace"), folder / MANIFEST)
    except OtherVersion:
        raise
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
    """Faults of the index files for other packages, and of the original paths."""
    originals = folder / ORIGINALS
    if manifest.originals_sha256 and not originals.is_file():
        yield Fault(ORIGINALS, "missing")
    elif manifest.originals_sha256 and sha256_of(originals) != manifest.originals_sha256:
        yield Fault(ORIGINALS, "its sha256 is not the manifest's")
    for name, content in other_indexes(manifest).items():
        if not (folder / name).is_file():
            yield Fault(name, "missing")
        elif (folder / name).read_bytes() != content:
            yield Fault(name, "does not match the manifest")


def _wrong_hashes(folder: Path, records: Sequence[ShardRecord]) -> Iterator[Fault]:
    """Faults of the tars as far as they can be found without an index."""
    for record in records:
        if not (folder / record.name).is_file():
            yield Fault(record.name, "missing")
        elif sha256_of(folder / record.name) != record.sha256:
            yield Fault(record.name, "its sha256 is not the manifest's")


def verify_shard(folder: Path, record: ShardRecord, rows: np.ndarray, deep: bool) -> list[Fault]:
    """The faults of one tar and its DALI index. Runs in a worker.

    Args:
        folder: The shard set.
        record: The tar, as the manifest lists it.
        rows: Its index rows (INDEX_DTYPE).
        deep: Also decode every image of an intact tar.
    """
    path = folder / record.name
    idx = path.with_suffix(DALI_INDEX_SUFFIX)
    if not path.is_file():
        return [Fault(record.name, "missing")]
    with doing("read", path):
        idx_text = idx.read_bytes() if idx.is_file() else b""
        data = path.read_bytes()
    intact = len(data) == record.bytes and hashlib.sha256(data).hexdigest() == record.sha256
    keys = _keys_of_tar(data, rows) if intact else _keys_of_idx(idx_text, len(rows))
    faults: list[Fault] = []
    if not intact:
        wrong_hash = Fault(record.name, "its sha256 is not the manifest's")
        faults = list(_differences(record, data, keys, rows)) or [wrong_hash]
    if idx_text != dali_index(keys, rows):
        faults.append(Fault(idx.name, "missing" if not idx.is_file() else "not the index of its tar"))
    if deep and intact:
        faults += _undecodable(record, data, keys, rows)
    return faults


def _keys_of_tar(data: bytes, rows: np.ndarray) -> list[str]:
    headers = (data[offset - tarfile.BLOCKSIZE : offset] for offset in rows["offset"].tolist())
    return [tarfile.TarInfo.frombuf(h, "ascii", "strict").name.removesuffix(".jpg") for h in headers]


def _keys_of_idx(text: bytes, samples: int) -> list[str]:
    """The keys that a DALI index names, one per sample; UNKNOWN_KEY for damaged lines."""
    lines = text.decode(errors="replace").splitlines()[1:]
    keys = [line.split()[3].removesuffix(".jpg") if len(line.split()) == 8 else UNKNOWN_KEY for line in lines[:samples]]
    return keys + [UNKNOWN_KEY] * (samples - len(keys))


def _differences(record: ShardRecord, data: bytes, keys: Sequence[str], rows: np.ndarray) -> Iterator[Fault]:
    """The differences between `data` and what `rows` say, by sample: both headers, image, label and padding."""
    if len(data) != record.bytes:
        length = f"{len(data)} bytes, expected {record.bytes}"
        yield Fault(record.name, length, None, min(len(data), record.bytes), record.bytes)
    end = 0
    for key, row in zip(keys, rows, strict=True):
        offset, size, label = int(row["offset"]), int(row["size"]), str(row["label"]).encode()
        jpeg = data[offset : offset + size]
        if zlib.crc32(jpeg) != row["crc32"]:
            yield Fault(record.name, "the image's bytes changed", key, offset, offset + size)
        start, after = offset - tarfile.BLOCKSIZE, offset + size
        tail = bytes(padded_to_blocks(size) - size) + tar_header(f"{key}.cls", len(label)) + label
        tail += bytes(padded_to_blocks(len(label)) - len(label))
        end = after + len(tail)
        # With an unknown key the expected headers are unknown; the damaged DALI index is reported as its own fault.
        known = key != UNKNOWN_KEY
        if known and data[start:offset] != tar_header(f"{key}.jpg", size):
            yield Fault(record.name, "the header before the image changed", key, start, offset)
        if known and data[after:end] != tail:
            yield Fault(record.name, "the label, its header or the padding changed", key, after, end)
    if any(data[end:]):
        yield Fault(record.name, "bytes behind the last sample changed", None, end, len(data))


def _undecodable(record: ShardRecord, data: bytes, keys: Sequence[str], rows: np.ndarray) -> Iterator[Fault]:
    """Images of an intact tar that cannot be decoded or have another size than the index says."""
    for key, row in zip(keys, rows, strict=True):
        offset, end = int(row["offset"]), int(row["offset"] + row["size"])
        try:
            with Image.open(BytesIO(data[offset:end])) as image:
                image.load()
                if image.size != (row["width"], row["height"]) or image.mode != "RGB":
                    yield Fault(record.name, f"{image.mode} of {image.size}, unlike the index", key, offset, end)
        except (OSError, ValueError, SyntaxError) as error:
            yield Fault(record.name, f"cannot be decoded ({error})", key, offset, end)
