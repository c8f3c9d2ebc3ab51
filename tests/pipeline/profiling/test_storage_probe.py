"""The file system of a set and what a read of it costs: on a virtual disk, and on a real FUSE folder where allowed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.profiling import storage_probe
from pipeline.profiling.page_cache import cached_share, drop_cache
from pipeline.profiling.storage_probe import StorageProbe, is_remote, mount_of, probe_storage
from pipeline.shards.reader import ShardSet, open_shards
from tests.support.shard_fixtures import sample, write_set
from tests.support.slow_folder import NoSlowFolder, slow_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Images of 40 kB: 20 MB in all."""
    jpeg = sample(0).jpeg + bytes(30_000)
    samples = [replace(sample(0), key=f"drawn_{number:04d}", jpeg=jpeg) for number in range(500)]
    return write_set(tmp_path_factory.mktemp("set"), samples, 250)


def ids(shards: ShardSet) -> np.ndarray:
    return np.random.default_rng(0).permutation(len(shards))


def test_the_deepest_and_latest_mount_holds_a_file(tmp_path: Path):
    """Mounts nest, and one may cover another at the same place. A name that begins alike is another folder."""
    folder = tmp_path / "data" / "sets"
    folder.mkdir(parents=True)
    lines = [
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw",
        f"2 1 0:50 / {tmp_path}/data rw - nfs4 host:/old rw",
        f"3 1 0:51 / {tmp_path}/data rw - fuse.sshfs host:/new rw",
        f"4 1 0:52 / {tmp_path}/dat rw - tmpfs tmpfs rw",
    ]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "mountinfo").write_text("\n".join(lines) + "\n")
    found = mount_of(folder, tmp_path)
    assert found is not None and (found.kind, found.source) == ("fuse.sshfs", "host:/new")
    elsewhere = mount_of(tmp_path / "other", tmp_path)
    assert elsewhere is not None and elsewhere.kind == "ext4"
    assert mount_of(folder, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("kind", "remote"), [("nfs4", True), ("fuse.rclone", True), ("fuseblk", False), ("xfs", False)]
)
def test_network_and_fuse_folders_are_told_from_disks(kind: str, remote: bool):
    assert is_remote(kind) is remote
    assert (
        StorageProbe(kind, "", remote).name
        == {
            "nfs4": "a network folder (nfs4)",
            "fuse.rclone": "a FUSE folder (fuse.rclone)",
            "fuseblk": "a disk (fuseblk)",
            "xfs": "a disk (xfs)",
        }[kind]
    )


@pytest.mark.parametrize(("latency_s", "bytes_s"), [(0.003, 40e6), (0.0, 10e6), (0.01, 1e15)])
def test_latency_and_bandwidth_of_a_virtual_disk(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, latency_s: float, bytes_s: float
):
    """A disk that serves one read after another: both figures come back, and several reads at a time bring no more."""
    now_s = [0.0]

    def pread(file: int, size: int, offset: int) -> bytes:
        now_s[0] += latency_s + size / bytes_s
        return b""

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    monkeypatch.setattr(storage_probe, "resident_pages", lambda tar: np.zeros(tar.stat().st_size // 4096, np.uint8))
    found = probe_storage(shards, ids(shards))
    assert found.latency_s == pytest.approx(latency_s, abs=1e-9)
    if bytes_s < 1e12:
        assert found.bytes_s == pytest.approx(bytes_s)
        one_s = latency_s + storage_probe.LARGE_BYTES / bytes_s
        assert found.parallel_bytes_s == pytest.approx(storage_probe.LARGE_BYTES / one_s)
        assert f"{1000 * latency_s:.1f} ms and {bytes_s / 1e6:.0f} MB/s a read" in str(found)
    else:
        assert found.bytes_s is None and "10.0 ms a read, 13 MB/s with 8 reads" in str(found)


def test_a_set_in_memory_is_not_probed(shards: ShardSet):
    for tar in shards.tars:
        tar.read_bytes()
    found = probe_storage(shards, ids(shards))
    assert found.latency_s is None and found.parallel_bytes_s is None and found.kind


def test_probed_places_are_cold_and_apart(shards: ShardSet):
    """Nothing else of the set is read."""
    drop_cache(shards.tars)
    if cached_share(shards.tars) > 0:
        pytest.skip("this file system keeps its cached pages")
    places = storage_probe._cold_places(shards, ids(shards), 40)
    assert len(places) == len(set(places)) == 40
    assert all(offset % storage_probe.LARGE_BYTES == 0 for _, offset in places)
    probe_storage(shards, ids(shards))
    assert 0 < cached_share(shards.tars) < 0.5


@pytest.fixture
def fuse(shards: ShardSet, tmp_path: Path) -> Iterator[Path]:
    try:
        with slow_folder(shards.folder, tmp_path / "mount", latency_ms=2, mb_s=100) as mount:
            yield mount
    except NoSlowFolder as reason:
        pytest.skip(str(reason))


def test_a_real_fuse_folder_is_named(fuse: Path):
    """Its reads are slower than it is told to be, by no more than the machine is busy."""
    found = probe_storage(open_shards(fuse), np.arange(500))
    assert (found.kind, found.source, found.remote) == ("fuse.slowtest", "slow", True)
    assert found.latency_s is not None and found.latency_s > 0.001
