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
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.imagenet.listing import ClassName

FORMAT = "alexnet-pipeline shards, version 3"
INDEX = "index.npy"
WIDS_INDEX = "wids.json"  # wids.ShardListDataset(".../wids.json")
TIMM_INFO = "_info.json"  # timm.create_dataset("wds/", root=".../train", split="train")
SEALED_NS = 1_348_963_200 * 10**9  # 30 September 2012: the time of change of a tar that is as it was when hashed
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


@dataclass(frozen=True)
class Sample:
    """One stored picture: `key` names it in the tar, `jpeg` is a baseline JPEG of `width` x `height` pixels."""

    key: str
    label: int
    jpeg: bytes
    width: int
    height: int


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
    return member_info(name, size).tobuf(tarfile.USTAR_FORMAT)


def member_info(name: str, size: int) -> tarfile.TarInfo:
    assert len(name) <= 100 and " " not in name, name
    info = tarfile.TarInfo(name)  # mtime, uid, gid are 0 unless set
    info.size, info.mode = size, 0o644
    return info


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
