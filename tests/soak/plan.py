"""Lists, fingerprints and plans 1,281,167 invented images, as many as ImageNet has, within limits of time and memory.

    python -m tests.soak.plan

Does so twice, once with the keys of ILSVRC's training tar and once with class folders. Reads and writes no file. Prints
the seconds of each part and the peak memory of the process. Exits with 1 above 60 s or 1 GB.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from pipeline.imagenet.listing import ClassName, Item, Items, Listing
from pipeline.shards.build import plan
from pipeline.shards.settings import ShardSettings

IMAGES, CLASSES = 1_281_167, 1000
LIMIT_S, LIMIT_BYTES = 60.0, 10**9


def tar_items() -> Iterator[Item]:
    """Items as in ILSVRC2012_img_train.tar: one file, keys such as n01440000_0."""
    path = Path("/data/imagenet/ILSVRC2012_img_train.tar")
    for number in range(IMAGES):
        label = number * CLASSES // IMAGES
        yield Item(f"n{1_440_000 + label:08d}_{number % 30_000}", label, path, number * 110_592, 110_000 + number % 512)


def folder_items() -> Iterator[Item]:
    """Items as in class folders: one file each."""
    for number in range(IMAGES):
        label = number * CLASSES // IMAGES
        wnid = f"n{1_440_000 + label:08d}"
        path = Path(f"/data/imagenet/train/{wnid}/{wnid}_{number % 30_000}.JPEG")
        yield Item(f"{wnid}_{number % 30_000}", label, path, 0, 110_000 + number % 512)


def peak_bytes() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, items: Iterator[Item]) -> None:
    """Lists, fingerprints and plans `items`, and prints the seconds and the peak memory."""
    times = [time.monotonic()]
    classes = tuple(ClassName(f"n{1_440_000 + label:08d}", "") for label in range(CLASSES))
    listing = Listing(name, "train", classes, Items.of(items))
    times.append(time.monotonic())
    record = listing.record()
    times.append(time.monotonic())
    counts = [len(job.items) for job in plan(listing, ShardSettings(), Path("x"))]
    times.append(time.monotonic())
    assert record["images"] == sum(counts) == IMAGES
    listed_s, record_s, plan_s = (b - a for a, b in pairwise(times))
    print(
        f"{name:8} listing {listed_s:.1f} s, record {record_s:.1f} s, plan of {len(counts):,} jobs {plan_s:.1f} s;"
        f" peak so far {peak_bytes() / 1e6:.0f} MB"
    )


def main() -> int:
    """Measures both listings. Returns 1 above the limits."""
    print(f"{'imports':8} {peak_bytes() / 1e6:.0f} MB")
    started_s = time.monotonic()
    measure("tar", tar_items())
    measure("folders", folder_items())
    took_s = time.monotonic() - started_s
    within = took_s <= LIMIT_S and peak_bytes() <= LIMIT_BYTES
    limits = f"at most {LIMIT_S:.0f} s and {LIMIT_BYTES / 1e6:.0f} MB"
    print(f"{took_s:.1f} s, peak {peak_bytes() / 1e6:.0f} MB, {limits}: {'passed' if within else 'EXCEEDED'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
