"""Opens a shard set, checks it against its manifest, and reads samples by their ids."""

from __future__ import annotations

import hashlib
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np

from pipeline.files import doing, sha256_of
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.shards.format import HASHED_MTIME_NS, INDEX, INDEX_DTYPE, Manifest, ShardRecord, repair_hint
from pipeline.shards.tar_files import TarFiles
from pipeline.shards.writer import mark_hashed
from pipeline.workers import ProgressCallback


class ShardSet:
    """An open shard set.

    Attributes:
        folder: Where its files are.
        manifest: What is in it.
        index: One row per sample (INDEX_DTYPE); the row number is the sample id.
        manifest_sha256: SHA-256 of manifest.json, which identifies the set.
    """

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
    def _files(self) -> TarFiles:
        """The open tars. Opened on first use, so each worker process opens its own."""
        return TarFiles(self.tars, [shard.bytes for shard in self.manifest.shards])

    def jpegs(self, ids: np.ndarray) -> list[np.ndarray]:
        """Reads the encoded images of the samples `ids`: read-only uint8 vectors.

        Raises:
            ValueError: a tar was truncated or removed, or cannot be read. The message names it.
        """
        return self._files.read(*self._places(ids))

    def read_ahead(self, ids: np.ndarray) -> None:
        """Asks the kernel to read the encoded images of the samples `ids` in the background, before `jpegs` does."""
        self._files.advise(*self._places(ids))

    def _places(self, ids: np.ndarray) -> tuple[list[int], list[int], list[int]]:
        """Shard, byte offset and size of each sample's encoded image."""
        rows = self.index[ids]
        return rows["shard"].tolist(), rows["offset"].tolist(), rows["size"].tolist()

    def __getstate__(self) -> dict[str, object]:
        """What another process gets: it opens the tars itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def part(self, ids: np.ndarray) -> ShardSet:
        """A set of these samples only, on the same files. Sample ids of the new set count from 0."""
        part = copy(self)
        part.index = self.index[ids]
        return part

    def key(self, sample_id: int) -> str:
        """The sample's key, read from the tar header in front of its bytes."""
        row = self.index[sample_id]
        start = int(row["offset"]) - tarfile.BLOCKSIZE
        header = self._files.read([int(row["shard"])], [start], [tarfile.BLOCKSIZE])[0].tobytes()
        return tarfile.TarInfo.frombuf(header, "ascii", "strict").name.removesuffix(".jpg")

    def where(self, sample_id: int) -> str:
        """The sample's place for messages, as `TAR:BYTE OFFSET:KEY`."""
        row = self.index[sample_id]
        return f"{self.manifest.shards[row['shard']].name}:{row['offset']}:{self.key(sample_id)}"


def open_shards(folder: str | Path, progress: ProgressCallback = lambda n: None) -> ShardSet:
    """Opens a shard set and checks it against its manifest.

    A tar is hashed only if its modification time shows that it may have changed since it was last hashed (see
    `mark_hashed`).

    Args:
        folder: One split's folder, such as OUT/train.
        progress: Called with the number of bytes hashed.

    Raises:
        ValueError: The folder is not a shard set, or a file does not match the manifest. The message names the file.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a shard set, which tools/make_shards.py writes")
    if not path.is_file():
        splits = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        make = f"make_shards writes it last: run python tools/make_shards.py SOURCE {folder.parent}"
        hint = f"did you mean {folder / splits[0]}?" if splits else make
        raise ValueError(f"{folder}: no {MANIFEST} here, so not a shard set; {hint}")
    with doing("read", path):
        text = path.read_bytes()
    manifest = Manifest.from_json(text.decode(errors="replace"), path)
    index = read_index(folder, manifest)
    _check_tars(folder, manifest, progress)
    return ShardSet(folder, manifest, index, hashlib.sha256(text).hexdigest())


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """The rows of index.npy (INDEX_DTYPE).

    Raises:
        ValueError: The file is missing or its hash is not the manifest's.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{path}: missing, though {MANIFEST} names it; {repair_hint(folder)}")
    with doing("read", path):
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise ValueError(f"{path}: its sha256 is not the one in {MANIFEST}; {repair_hint(folder)}")
    index: np.ndarray = np.load(BytesIO(data))
    assert index.dtype == INDEX_DTYPE and len(index) == manifest.samples
    return index


def rows_by_shard(index: np.ndarray, manifest: Manifest) -> list[np.ndarray]:
    """The index rows of each shard. The index is sorted by shard."""
    return np.split(index, np.searchsorted(index["shard"], range(1, len(manifest.shards))))


def _check_tars(folder: Path, manifest: Manifest, progress: ProgressCallback) -> None:
    to_hash: list[ShardRecord] = []
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {MANIFEST} names it; {repair_hint(folder)}")
        if (found := path.stat().st_size) != shard.bytes:
            raise ValueError(f"{path}: {found} bytes, expected {shard.bytes}; it was changed, {repair_hint(folder)}")
        if path.stat().st_mtime_ns != HASHED_MTIME_NS:
            to_hash.append(shard)
    if not to_hash:
        return
    with ThreadPoolExecutor() as pool:  # threads suffice: hashlib releases the interpreter lock
        for shard, digest in zip(to_hash, pool.map(lambda s: sha256_of(folder / s.name), to_hash), strict=True):
            if digest != shard.sha256:
                raise ValueError(
                    f"{folder / shard.name}: sha256 {digest[:12]}..., expected {shard.sha256[:12]}...;"
                    f" it was changed, {repair_hint(folder)}"
                )
            progress(shard.bytes)
            with suppress(OSError):  # a read-only folder: the tar is hashed again next time
                mark_hashed(folder / shard.name, warn=False)
