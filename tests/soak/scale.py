"""A synthetic shard set of ImageNet-21k's size: opening, ordering and resuming it on a rank, and sharing it by ranks.

    python -m tests.soak.scale [--samples 14197122] [--ranks 1000]

Writes an index with invented sizes, and tars without content (sparse files, no disk space), into a temporary folder. A
process of its own, like a rank, opens the set and prepares the first batch from the middle of an epoch, for each order;
it prints the seconds (on the clock, and of CPU time) and the peak memory. Then the ranks read an epoch, by calculation:
other numbers of ranks continue it in the middle, and an evaluation follows. Exits with 1 above 5 s of CPU time or 2 GB
on a rank, or unless every sample is read exactly once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.imagenet.listing import ClassName
from pipeline.loader.inputs import TrainPlanner, order_of
from pipeline.loader.order import Ids, Order, batch_ids, evaluation_batches, steps_per_epoch
from pipeline.loader.settings import LoaderSettings
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.format import INDEX_DTYPE, Manifest, ShardRecord
from pipeline.shards.reader import open_shards
from pipeline.shards.settings import MAX_SHARD_SAMPLES
from pipeline.shards.writer import mark_hashed, publish

SAMPLES, CLASSES = 14_197_122, 21_841  # ImageNet-21k, the release of fall 2011
RANKS, SAMPLES_OF_RANK = 1000, 32  # of a batch
LIMIT_S, LIMIT_BYTES = 5.0, 2 * 10**9
EPOCH = 3
ORDERS: tuple[Order, ...] = ("global", "windowed")


def write_synthetic_set(folder: Path, samples: int, classes: int = CLASSES) -> None:
    """Writes the index and manifest of `samples` samples, and their tars as files of the right size without content."""
    ids = np.arange(samples)
    index = np.zeros(samples, INDEX_DTYPE)
    index["shard"] = ids // MAX_SHARD_SAMPLES
    index["size"] = 20_000 + ids * 7919 % 20_011
    index["offset"] = 512 + ids % MAX_SHARD_SAMPLES * 45_056  # room for the largest image and two headers
    index["label"] = ids * 104_729 % classes
    index["width"], index["height"], index["crc32"] = 341, 256, ids % 2**32
    records = []
    for shard, start in enumerate(range(0, samples, MAX_SHARD_SAMPLES)):
        count = min(MAX_SHARD_SAMPLES, samples - start)
        record = ShardRecord(f"train-{shard:06d}.tar", count, 512 + count * 45_056, f"{shard:064x}")
        with (folder / record.name).open("wb") as file:
            file.truncate(record.bytes)
        mark_hashed(folder / record.name)
        records.append(record)
    names = tuple(ClassName(f"n{label:08d}", f"class {label}") for label in range(classes))

    def manifest_of(index_sha256: str) -> Manifest:
        return Manifest("train", samples, names, tuple(records), index_sha256, {}, {}, ())

    publish(folder, manifest_of, index)


def start_of_a_rank(folder: Path, order: Order, ranks: int) -> dict[str, float]:
    """Opens the set and prepares a batch from the middle of an epoch, as the loader of a rank does.

    The planner computes the order of the next epoch, too, in a thread; the peak memory has both.

    Returns:
        Seconds on the clock and of this thread's CPU time for opening and for the first batch; peak memory in bytes
        before and after; the batch's first sample and the one that is expected.
    """
    before_bytes = peak_bytes()
    times_s, cpu_s = [time.monotonic()], [time.thread_time()]
    shards = open_shards(folder)
    times_s.append(time.monotonic())
    cpu_s.append(time.thread_time())
    zeros, ones = np.zeros((3, 3)), np.ones(3)
    basis = Eigenbasis(1, ones, zeros, ones, np.eye(3), np.ones((3, 256, 256), np.float32), shards.manifest_sha256)
    settings = LoaderSettings(batch=SAMPLES_OF_RANK * ranks, order=order)
    step, rank = steps_per_epoch(len(shards), settings.batch) // 2, ranks - 1
    with closing(TrainPlanner(shards, basis, settings, rank, ranks).batches(EPOCH, step)) as batches:
        first = next(batches)
        times_s.append(time.monotonic())
        cpu_s.append(time.thread_time())
    after_bytes = peak_bytes()
    place = step * settings.batch + rank * SAMPLES_OF_RANK
    return {
        "open_s": times_s[1] - times_s[0],
        "open_cpu_s": cpu_s[1] - cpu_s[0],
        "resume_s": times_s[2] - times_s[1],
        "resume_cpu_s": cpu_s[2] - cpu_s[1],
        "before_bytes": before_bytes,
        "peak_bytes": after_bytes,
        "first_sample": int(first.ids[0]),
        "expected_sample": int(order_of(shards, settings, EPOCH)[place]),
    }


def peak_bytes() -> int:
    """Peak memory of this process. The kernel's `ru_maxrss` would begin with that of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def times_read(order: Ids, ranks_of_halves: tuple[int, int], batch: int) -> NDArray[np.uint8]:
    """How often each sample is read in an epoch, if another number of ranks continues it in the middle."""
    found = np.zeros(len(order), np.uint8)
    steps = steps_per_epoch(len(order), batch)
    for ranks, half in zip(ranks_of_halves, (range(steps // 2), range(steps // 2, steps)), strict=True):
        for step in half:
            for rank in range(ranks):
                np.add.at(found, batch_ids(order, step, batch, rank, ranks), 1)  # counts what occurs twice in a batch
    return found


def times_evaluated(samples: int, ranks: int, batch: int) -> NDArray[np.uint8]:
    """How often each sample is read by an evaluation."""
    found = np.zeros(samples, np.uint8)
    for rank in range(ranks):
        for ids in evaluation_batches(samples, batch, rank, ranks):
            np.add.at(found, ids, 1)
    return found


def faults_of_sharing(order: Ids, ranks: int) -> Iterator[str]:
    """Yields what is wrong with how `ranks`, and then half of them, share an epoch and an evaluation."""
    batch = SAMPLES_OF_RANK * ranks
    read, kept = times_read(order, (ranks, ranks // 2), batch), len(order) // batch * batch
    if not (read[order[:kept]] == 1).all() or read[order[kept:]].any():
        yield "training does not read every sample of the whole batches once"
    if not (times_evaluated(len(order), ranks, batch) == 1).all():
        yield "evaluation does not read every sample once"


def main() -> int:
    """Measures a rank for each order, then counts what all ranks read. Returns 1 above the limits or after a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--as-rank", nargs=2, metavar=("FOLDER", "ORDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        print(json.dumps(start_of_a_rank(Path(args.as_rank[0]), args.as_rank[1], args.ranks)))
        return 0
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic_set(Path(folder), args.samples)
        for order in ORDERS:
            command = [sys.executable, "-m", "tests.soak.scale", "--ranks", str(args.ranks), "--as-rank", folder, order]
            rank = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            took = {
                name: f"{rank[f'{name}_s']:.1f} s (CPU {rank[f'{name}_cpu_s']:.1f} s)" for name in ("open", "resume")
            }
            peak_mb, libraries_mb = rank["peak_bytes"] / 1e6, rank["before_bytes"] / 1e6
            print(
                f"{order:8} open {took['open']}, first batch from the middle {took['resume']};"
                f" peak {peak_mb:,.0f} MB, {libraries_mb:,.0f} MB before opening",
                flush=True,
            )
            if rank["open_cpu_s"] + rank["resume_cpu_s"] > LIMIT_S or rank["peak_bytes"] > LIMIT_BYTES:
                faults.append(f"{order}: above {LIMIT_S:.0f} s or {LIMIT_BYTES / 1e6:,.0f} MB")
            if rank["first_sample"] != rank["expected_sample"]:
                faults.append(f"{order}: begins with sample {rank['first_sample']}, not {rank['expected_sample']}")
        shards = open_shards(folder)
        for order in ORDERS:
            ids = order_of(shards, LoaderSettings(order=order), EPOCH)
            faults += [f"{order}: {fault}" for fault in faults_of_sharing(ids, args.ranks)]
    batches = f"batches of {SAMPLES_OF_RANK * args.ranks:,}"
    print(f"{args.samples:,} samples, {args.ranks:,} ranks, {batches}: {'; '.join(faults) or 'each read exactly once'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
