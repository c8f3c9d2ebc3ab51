"""The shard format: file names, records, dtypes and the content of each index file. See docs/shards.md.

A shard set is one folder per split. The same input gives the same bytes:

    train-000000.tar ...   USTAR; members KEY.jpg and KEY.cls (the class index in ASCII); mtime and owner 0
    train-000000.idx ...   DALI's index v1.2, for fn.readers.webdataset
    index.npy              INDEX_DTYPE, one row per sample; the row number is the sample id
    wids.json, _info.json  the tars and the number of samples in each, for the wids and timm packages
    originals.jsonl        the source's path of each sample whose key does not give it; absent if there is none
    manifest.json          the content of the set, its settings and source, and a hash of every file; written last

A folder without a manifest is not a shard set. A file gets its final name only once it is complete.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.imagenet.listing import ClassName

FORMAT_NAME, FORMAT_VERSION = "alexnet-pipeline shards, version ", 4
FORMAT = f"{FORMAT_NAME}{FORMAT_VERSION}"
# Versions with the same tars and index. Version 3 has no record of what was skipped and of original paths.
READABLE_VERSIONS = (3, 4)
INDEX = "index.npy"
ORIGINALS = "originals.jsonl"
DALI_INDEX_SUFFIX = ".idx"
WIDS_INDEX = "wids.json"  # wids.ShardListDataset(".../wids.json")
TIMM_INFO = "_info.json"  # timm.create_dataset("wds/", root=".../train", split="train")
HASHED_MTIME_NS = 1_348_963_200 * 10**9  # 30 September 2012; see writer.mark_hashed
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<i4"),  # position in the manifest's `shards`
        ("offset", "<i8"),  # of the JPEG's first byte in the tar
        ("size", "<i4"),  # of the JPEG, bytes
        ("label", "<i4"),  # class index: position of the wnid in sorted order
        ("width", "<u2"),  # pixels
        ("height", "<u2"),
        ("crc32", "<u4"),  # of the JPEG, so that verify can name the damaged sample
    ]
)


@dataclass(frozen=True)
class Sample:
    """A stored image with its label.

    Attributes:
        key: Name of the sample in the tar, without suffix.
        label: Class index.
        jpeg: A baseline JPEG of `width` x `height` pixels.
        width: Pixels.
        height: Pixels.
    """

    key: str
    label: int
    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class ShardRecord:
    """A written tar, as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Quarantined:
    """An image of the source that could not be decoded and is not in the set, with the reason."""

    key: str
    reason: str


@dataclass(frozen=True)
class SkippedCount:
    """How many entries of the source were skipped for one reason, such as `hidden` or `suffix .txt`."""

    reason: str
    count: int


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        split: `train` or `val`.
        samples: Number of samples in all shards.
        classes: Classes in the order of their wnids; the position is the label.
        shards: Tars in order; `shard` of an index row is a position in it.
        index_sha256: SHA-256 of index.npy.
        settings: Free-form record of the settings and library versions that made the set.
        source: Free-form record of the source that the set was made from.
        quarantined: Images that are not in the set, sorted by key.
        skipped: Entries of the source that are no images, sorted by reason.
        classes_without_images: Wnids of the classes that no image of the source had.
        originals_sha256: SHA-256 of originals.jsonl; None without that file.
    """

    split: str
    samples: int
    classes: tuple[ClassName, ...]
    shards: tuple[ShardRecord, ...]
    index_sha256: str
    settings: dict[str, Any]
    source: dict[str, Any]
    quarantined: tuple[Quarantined, ...]
    skipped: tuple[SkippedCount, ...] = ()
    classes_without_images: tuple[str, ...] = ()
    originals_sha256: str | None = None

    def to_json(self) -> str:
        """The text of the file. Equal manifests give equal text; the last field is the hash of all others."""
        fields = {"format": FORMAT, **asdict(self)}
        return json.dumps({**fields, "sha256": _json_sha256(fields)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Reads the text that `to_json` writes.

        Args:
            text: Content of the file.
            path: Where it came from, for the error message only.

        Raises:
            ValueError: The text is not an intact manifest of one of READABLE_VERSIONS.
        """
        try:
            fields = json.loads(text)
            found = fields.pop("format", None) if isinstance(fields, dict) else None
            version = str(found).removeprefix(FORMAT_NAME)
            if not str(found).startswith(FORMAT_NAME) or not version.isdecimal():
                raise ValueError(f"its format is not {FORMAT!r}")
            if int(version) not in READABLE_VERSIONS:
                raise OtherVersion(path, int(version))
            if fields.pop("sha256") != _json_sha256({"format": found, **fields}):
                raise ValueError("its text does not match its own sha256")
            fields["classes"] = tuple(ClassName(**entry) for entry in fields["classes"])
            fields["shards"] = tuple(ShardRecord(**entry) for entry in fields["shards"])
            fields["quarantined"] = tuple(Quarantined(**entry) for entry in fields["quarantined"])
            fields["skipped"] = tuple(SkippedCount(**entry) for entry in fields.get("skipped", ()))
            fields["classes_without_images"] = tuple(fields.get("classes_without_images", ()))
            return cls(**fields)
        except OtherVersion:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a shard set's manifest ({error}); {repair_hint(path.parent)}") from error


class OtherVersion(ValueError):
    """A manifest of a version that this project does not read."""

    def __init__(self, path: Path, version: int) -> None:
        fix = f"make the set again into another folder: python tools/make_shards.py SOURCE {path.parent.parent}-new"
        if version > FORMAT_VERSION:
            fix = "update this project"
        super().__init__(f"{path}: a shard set of format version {version}, expected one of {READABLE_VERSIONS}; {fix}")


def originals_text(originals: Mapping[str, str]) -> bytes:
    """The content of originals.jsonl: one JSON object per line with `key` and `path`, sorted by key."""
    lines = (json.dumps({"key": key, "path": path}, ensure_ascii=False) for key, path in sorted(originals.items()))
    return "".join(f"{line}\n" for line in lines).encode()


def _json_sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def repair_hint(folder: Path) -> str:
    """The end of an error message about the damaged shard set in `folder`: the command that repairs it."""
    return f"repair it: python tools/make_shards.py SOURCE {folder.parent} --repair"


def dali_index(keys: Sequence[str], rows: np.ndarray) -> bytes:
    """The text of DALI's index v1.2 for one tar.

    Args:
        keys: Keys of the samples in the tar, in order.
        rows: Their index rows (INDEX_DTYPE).
    """
    lines = [f"v1.2 {len(keys)}\n"]
    for key, offset, size, label in zip(keys, rows["offset"], rows["size"], rows["label"], strict=True):
        label_offset = offset + padded_to_blocks(size) + tarfile.BLOCKSIZE
        lines.append(f"jpg {offset} {size} {key}.jpg cls {label_offset} {len(str(label))} {key}.cls\n")
    return "".join(lines).encode()


def padded_to_blocks(size: int) -> int:
    """Bytes that `size` bytes of data occupy in a tar: whole blocks of 512."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def tar_member(name: str, size: int) -> tarfile.TarInfo:
    """The metadata of a tar member of `size` bytes. Time and owner are fixed, so equal input gives equal tars."""
    assert len(name) <= 100 and " " not in name, name
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0 unless set
    member.size, member.mode = size, 0o644
    return member


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes that precede the data of `tar_member(name, size)`."""
    return tar_member(name, size).tobuf(tarfile.USTAR_FORMAT)


def other_indexes(manifest: Manifest) -> dict[str, bytes]:
    """Name and content of the index files for other packages (wids, timm), which follow from the manifest alone."""
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
