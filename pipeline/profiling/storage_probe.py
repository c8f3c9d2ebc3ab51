"""The file system that holds a set, and what a single read of it costs: time before the first byte, and bytes a second.

The two limits require different cures. If each read takes long to begin, as on a network folder, more and larger reads
at a time help. If the bytes a second are limited, as on a slow disk, only a faster disk or fewer bytes help. The probe
reads a few parts that are not in memory, one at a time and then several at once.
"""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.host import ROOT, Mount, mounts
from pipeline.loader.order import Ids
from pipeline.profiling.page_cache import resident_pages
from pipeline.shards.reader import ShardSet

REMOTE_KINDS = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "beegfs", "gpfs", "glusterfs", "afs", "virtiofs")
SMALL_BYTES, LARGE_BYTES = mmap.PAGESIZE, 32 * mmap.PAGESIZE  # 128 KiB: one request on most network file systems
READS = 8  # one after another of each size; and so many at a time
PARALLEL_READS = 32  # of the large size: a limit of bytes a second may let the first ones pass
MIN_MORE_SHARE = 0.05  # of a small read's time, by which a large one must take longer to show the bytes a second
MAX_S = 1.0  # a probe that has taken so long reads no more


@dataclass(frozen=True)
class StorageProbe:
    """What holds a set, and what reads of parts cost that were not in memory.

    Attributes:
        kind: type of the file system, e.g. "ext4", "nfs4", "fuse.sshfs".
        source: what is mounted there, in the words of the file system.
        remote: whether reads may cross a network, or a process of a user (FUSE).
        latency_s: seconds before the first byte of a read; None if too little of the set was cold, or readable.
        bytes_s: bytes a second of one read after that; None if they hardly take time.
        parallel_bytes_s: bytes a second of several reads at the same time.
    """

    kind: str
    source: str
    remote: bool
    latency_s: float | None = None
    bytes_s: float | None = None
    parallel_bytes_s: float | None = None

    def record(self) -> dict[str, Any]:
        """The entries for stall.json."""
        return asdict(self)

    @property
    def name(self) -> str:
        """The kind of storage in a few words."""
        if self.kind == "fuse" or self.kind.startswith("fuse."):
            return f"a FUSE folder ({self.kind})"
        return f"a network folder ({self.kind})" if self.remote else f"a disk ({self.kind})"

    def __str__(self) -> str:
        if self.latency_s is None:
            return self.name
        speed = "" if self.bytes_s is None else f" and {self.bytes_s / 1e6:,.0f} MB/s"
        text = f"{self.name}: {1000 * self.latency_s:.1f} ms{speed} a read"
        if self.parallel_bytes_s is None:
            return text
        return f"{text}, {self.parallel_bytes_s / 1e6:,.0f} MB/s with {READS} reads at a time"


def mount_of(path: Path, root: Path = ROOT) -> Mount | None:
    """The mount that holds `path`: of those above it, the deepest, and of two at one place, the later one."""
    full = path.resolve()
    above = [mount for mount in mounts(root) if full == Path(mount.point) or Path(mount.point) in full.parents]
    deepest = max((len(Path(mount.point).parts) for mount in above), default=0)
    return next((mount for mount in reversed(above) if len(Path(mount.point).parts) == deepest), None)


def is_remote(kind: str) -> bool:
    """Whether reads of this type of file system may cross a network or a process of a user."""
    return kind in REMOTE_KINDS or kind == "fuse" or kind.startswith("fuse.")


def probe_storage(shards: ShardSet, ids: Ids) -> StorageProbe:
    """Reads a few parts of the set that are not in memory, and takes their times.

    Args:
        shards: the set.
        ids: samples near which to read; choose those that nothing else is about to read.
    """
    mount = mount_of(shards.folder)
    kind, source = (mount.kind, mount.source) if mount else ("unknown", "")
    found = StorageProbe(kind, source, is_remote(kind))
    places = _cold_places(shards, ids, 2 * READS + PARALLEL_READS)
    if len(places) < 2 * READS + PARALLEL_READS:
        return found
    until_s = time.perf_counter() + MAX_S
    small_s, large_s = (
        [_read_s(place, size) for place in some if time.perf_counter() < until_s]
        for some, size in ((places[:READS], SMALL_BYTES), (places[READS : 2 * READS], LARGE_BYTES))
    )
    if len(large_s) < READS:
        return replace(found, latency_s=median(small_s))
    began_s = time.perf_counter()
    with ThreadPoolExecutor(READS) as readers:
        list(readers.map(lambda place: _read_s(place, LARGE_BYTES), places[2 * READS :]))
    parallel = PARALLEL_READS * LARGE_BYTES / (time.perf_counter() - began_s)
    more_bytes, more_s = LARGE_BYTES - SMALL_BYTES, median(large_s) - median(small_s)
    if more_s < MIN_MORE_SHARE * median(small_s):  # the bytes take too little time to be measured
        return replace(found, latency_s=median(small_s), parallel_bytes_s=parallel)
    latency_s = max(0.0, median(small_s) - more_s * SMALL_BYTES / more_bytes)
    return replace(found, latency_s=latency_s, bytes_s=more_bytes / more_s, parallel_bytes_s=parallel)


def _cold_places(shards: ShardSet, ids: Ids, number: int) -> list[tuple[Path, int]]:
    """Tars and offsets of so many parts of LARGE_BYTES, none of which is in memory and no two of which overlap."""
    places, rows, pages = list[tuple[Path, int]](), shards.index[ids], LARGE_BYTES // mmap.PAGESIZE
    resident = dict[int, NDArray[np.uint8]]()
    taken = set[tuple[int, int]]()
    for shard, offset in zip(rows["shard"].tolist(), rows["offset"].tolist(), strict=True):
        if shard not in resident:
            try:
                resident[shard] = resident_pages(shards.tars[shard])
            except ValueError:  # the kernel does not show it to this user
                return []
        first = int(offset) // LARGE_BYTES * pages
        cold = resident[shard][first : first + pages]
        if len(cold) == pages and not cold.any() and (shard, first) not in taken:
            taken.add((shard, first))
            places.append((shards.tars[shard], first * mmap.PAGESIZE))
        if len(places) == number:
            break
    return places


def _read_s(place: tuple[Path, int], size: int) -> float:
    """Seconds of reading so many bytes at a place of a file, without read-ahead."""
    path, offset = place
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        began_s = time.perf_counter()
        os.pread(file.fileno(), size, offset)
        return time.perf_counter() - began_s
