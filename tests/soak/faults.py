"""Ways in which loading goes wrong, for planted_stalls: a slow disk, noisy neighbours, expensive work, large images."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn
from PIL import Image

from pipeline.host import whole_cores
from pipeline.loader import graphs
from pipeline.loader.augment import STORED
from pipeline.shards.format import Sample, ShardRecord
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.shards.writer import mark_hashed
from tests.support import shard_fixtures

CORES = whole_cores()
READ_AHEAD_BATCHES = 4  # that the loader asks the kernel to read before it needs them
SAMPLES_OF_A_SHARD = 128
LARGE_IMAGES = 256


class Disk(ShardSet):
    """A shard set on an emulated disk that reads ahead.

    Args:
        of: the set.
        img_s: throughput of the disk.
        every: one batch in so many takes `burst_s` longer, as at the start of a shard; 0 for none.
        burst_s: seconds of a burst.
        cache: read nothing twice. The set then is 50 times as large, with the same images under other ids.
    """

    def __init__(self, of: ShardSet, img_s: float, every: int = 0, burst_s: float = 0.0, cache: bool = False) -> None:
        super().__init__(of.folder, of.manifest, np.tile(of.index, 50 if cache else 1), of.manifest_sha256)
        self.img_s, self.every, self.burst_s, self.cache = img_s, every, burst_s, cache
        self.ready_s, self.batches = 0.0, 0
        self.names, self.cached = np.arange(len(self.index)), np.zeros(len(self.index), bool)

    def part(self, ids: np.ndarray) -> ShardSet:
        """These samples, on the same disk and in the same cache."""
        part = super().part(ids)
        assert isinstance(part, Disk)
        part.names = self.names[ids]
        return part

    def jpegs(self, ids: np.ndarray) -> list[np.ndarray]:
        """The bytes, after the time that the disk takes to read them."""
        self.batches += 1
        names = self.names[ids]
        read = len(ids) - int(self.cached[names].sum())
        self.cached[names] = self.cache
        cost_s = read / self.img_s
        if self.every and self.batches % self.every == 0:
            cost_s += self.burst_s
        now_s = time.perf_counter()
        # Between calls the disk went on reading, as far as its read-ahead goes.
        self.ready_s = max(self.ready_s, now_s - READ_AHEAD_BATCHES * len(ids) / self.img_s) + cost_s
        time.sleep(max(0.0, self.ready_s - now_s))
        return super().jpegs(ids)


BURN = """
import os, threading
threading.Thread(target=lambda: (os.read({0}, 1), os._exit(0)), daemon=True).start()
while True:
    sum(range(10_000))
"""


@contextmanager
def noisy_neighbours(per_core: int = 1) -> Iterator[None]:
    """Other processes use every core. They are not children of this process, and end when a pipe closes."""
    with _processes(per_core * CORES):
        yield


@contextmanager
def other_process() -> Iterator[None]:
    """One other process uses a core, and no more."""
    with _processes(1):
        yield


@contextmanager
def _processes(number: int) -> Iterator[None]:
    ours, theirs = os.pipe()[::-1]
    for _ in range(number):
        command = ["sh", "-c", '"$0" -c "$1" &', sys.executable, BURN.format(theirs)]
        subprocess.run(command, pass_fds=[theirs], check=True)
    os.close(theirs)
    time.sleep(1.0)  # until they have started
    try:
        yield
    finally:
        os.close(ours)


@contextmanager
def expensive_augmentation() -> Iterator[None]:
    """DALI's threads blur every crop before the CPU kernel mirrors and normalises it."""
    original = graphs.mirror_normalize_node

    def with_blur(crop: Any, *rest: Any) -> Any:
        return original(fn.gaussian_blur(crop, window_size=9), *rest)

    graphs.mirror_normalize_node = with_blur
    try:
        yield
    finally:
        graphs.mirror_normalize_node = original


@contextmanager
def one_core() -> Iterator[None]:
    """This process and DALI's threads run on the first core only."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(all_cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


def copied_set(source: Path, folder: Path, copies: int) -> Path:
    """The set in `source`, so many times one after another, in files of their own. Returns `folder`."""
    shards = open_shards(source)
    if (folder / "manifest.json").is_file():
        return folder
    folder.mkdir(parents=True)
    records, rows = list[ShardRecord](), list[np.ndarray]()
    for _ in range(copies):
        for number, record in enumerate(shards.manifest.shards):
            name = f"train-{len(records):06d}.tar"
            shutil.copyfile(source / record.name, folder / name)
            mark_hashed(folder / name)
            part = shards.index[shards.index["shard"] == number].copy()
            part["shard"] = len(records)
            records.append(replace(record, name=name))
            rows.append(part)
    shutil.copyfile(source / "mean_image.npy", folder / "mean_image.npy")
    index = BytesIO()
    np.save(index, np.concatenate(rows))
    (folder / "index.npy").write_bytes(index.getvalue())
    hashed = hashlib.sha256(index.getvalue()).hexdigest()
    samples = sum(map(len, rows))
    manifest = replace(shards.manifest, samples=samples, shards=tuple(records), index_sha256=hashed).to_json().encode()
    (folder / "manifest.json").write_bytes(manifest)
    basis = json.loads((source / "eigenbasis.json").read_text())
    basis["manifest_sha256"] = hashlib.sha256(manifest).hexdigest()
    (folder / "eigenbasis.json").write_text(json.dumps(basis))
    return folder


def large_images(folder: Path) -> ShardSet:
    """A set of images of 1,400 x 1,100 pixels."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(LARGE_IMAGES):
        coarse = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((1400, 1100), Image.Resampling.BICUBIC)
        samples.append(Sample(f"large_{number:04d}", 0, shard_fixtures.jpeg_of(image), 1400, 1100))
    return shard_fixtures.write_set(folder, samples, SAMPLES_OF_A_SHARD)


def square_images(folder: Path, shards: ShardSet) -> ShardSet:
    """The same images, cut to their central 256 x 256."""
    samples = []
    for number in range(len(shards)):
        pixels = shard_fixtures.decoded(shards, number)
        top, left = ((side - STORED) // 2 for side in pixels.shape[:2])
        image = Image.fromarray(pixels[top : top + STORED, left : left + STORED])
        samples.append(Sample(f"square_{number:04d}", 0, shard_fixtures.jpeg_of(image), STORED, STORED))
    folder.mkdir()
    return shard_fixtures.write_set(folder, samples, SAMPLES_OF_A_SHARD)


def slow_disk(shards: ShardSet, supply: float) -> ShardSet:
    """A disk of a third of the healthy supply."""
    return Disk(shards, 0.3 * supply)


def slow_disk_with_cache(shards: ShardSet, supply: float) -> ShardSet:
    """The same, with a page cache that is cold."""
    return Disk(shards, 0.3 * supply, cache=True)


def bursty_disk(shards: ShardSet, supply: float) -> ShardSet:
    """A fast disk that pauses every four batches, for the time of six."""
    return Disk(shards, 20 * supply, 4, 6 * SAMPLES_OF_A_SHARD / supply)
