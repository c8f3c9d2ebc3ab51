"""ImageNet's whole listing, made up: are 1,281,167 pictures listed, fingerprinted and shared out in little memory?

    PYTHONPATH=. python tests/long_plan.py

Twice, once with the keys of ILSVRC's training tar and once as class folders; no file is read or written. Prints the
seconds of each part and the peak memory of the process; exits with 1 above 60 s or 1 GB.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from pipeline.imagenet.listing import ClassName, Item, Items, Listing
from pipeline.shards.build import ShardSettings, plan

IMAGES, CLASSES = 1_281_167, 1000
LIMIT_S, LIMIT_BYTES = 60.0, 10**9


def tar_items() -> Iterator[Item]:
    """As ILSVRC2012_img_train.tar lists them: one file, keys n01440000_0 and so on."""
    path = Path("/data/imagenet/ILSVRC2012_img_train.tar")
    for number in range(IMAGES):
        label = number * CLASSES // IMAGES
        yield Item(f"n{1_440_000 + label:08d}_{number % 30_000}", label, path, number * 110_592, 110_000 + number % 512)


def folder_items() -> Iterator[Item]:
    """As class folders list them: a file each."""
    for number in range(IMAGES):
        label = number * CLASSES // IMAGES
        wnid = f"n{1_440_000 + label:08d}"
        path = Path(f"/data/imagenet/train/{wnid}/{wnid}_{number % 30_000}.JPEG")
        yield Item(f"{wnid}_{number % 30_000}", label, path, 0, 110_000 + number % 512)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, items: Iterator[Item]) -> None:
    """Lists, fingerprints and plans `items`, and prints what it took."""
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
    """Both listings; 1 above the limits."""
    print(f"{'imports':8} {peak_bytes() / 1e6:.0f} MB")
    started_s = time.monotonic()
    measure("tar", tar_items())
    measure("folders", folder_items())
    took_s = time.monotonic() - started_s
    fine = took_s <= LIMIT_S and peak_bytes() <= LIMIT_BYTES
    limits = f"at most {LIMIT_S:.0f} s and {LIMIT_BYTES / 1e6:.0f} MB"
    print(f"{took_s:.1f} s, peak {peak_bytes() / 1e6:.0f} MB, {limits}: {'fine' if fine else 'TOO MUCH'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
