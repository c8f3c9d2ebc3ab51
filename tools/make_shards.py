"""Turns ImageNet into shard sets: OUT/train and OUT/val, one folder per split that SOURCE holds.

    python tools/make_shards.py /data/imagenet data/imagenet-256

SOURCE is a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (read where
they are, never unpacked), or with train/<wnid>/*.JPEG. Pictures get a short side of 256. The same command after an
interruption goes on where it stopped; over a finished set it does nothing. Prints a line per split.

    python tools/make_shards.py data/imagenet-256 --verify            # every hash and index row; --deep: every picture
    python tools/make_shards.py /data/imagenet data/imagenet-256 --repair   # rebuilds what is damaged, byte for byte

Exits with 1 when more pictures than --max-quarantine cannot be decoded or --verify finds a fault, with 2 on wrong
input.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from cli import Progress, run, write_json

from pipeline.resize import FILTERS, STORED_SHAPES, ResizeSettings
from pipeline.sharder import OverQuarantine, ShardSettings, make_split, repair_split
from pipeline.shards import Manifest
from pipeline.sources import SPLITS, open_source
from pipeline.verify import verify
from pipeline.workers import executor_of

QUARANTINE_SHARE = 0.001
QUARANTINE_FLOOR = 10  # a small set may hold a few bad images too


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", nargs="?", help="not needed for --verify")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--split", choices=SPLITS, help="only this split (default: every split that SOURCE holds)")
    default, resize = ShardSettings(), ResizeSettings()
    parser.add_argument("--stored", choices=STORED_SHAPES, default=resize.stored, help="default: %(default)s")
    parser.add_argument("--filter", choices=FILTERS, default=resize.filter, help="default: %(default)s")
    parser.add_argument("--quality", type=int, default=resize.quality, help="of the JPEGs; default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the samples' order; default: %(default)s")
    parser.add_argument("--shard-samples", type=int, default=default.shard_samples, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument(
        "--max-quarantine",
        type=int,
        metavar="N",
        help=f"images that may be undecodable; default: 1 in {1 / QUARANTINE_SHARE:,.0f}, at least {QUARANTINE_FLOOR}",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--verify", action="store_true", help="check what is in OUT; name every fault")
    mode.add_argument("--repair", action="store_true", help="rebuild the damaged or missing shards of OUT from SOURCE")
    parser.add_argument("--deep", action="store_true", help="with --verify: also decode every picture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what the screen says")
    return parser.parse_args()


def main() -> int:
    """Shards, verifies or repairs every wanted split."""
    args = parse()
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}, expected at least 1")
    if args.verify:
        return check(args)
    if args.source is None:
        raise ValueError("one folder given, expected SOURCE and OUT (only --verify does without SOURCE)")
    if args.deep:
        raise ValueError("--deep without --verify; add --verify")
    settings = ShardSettings(
        ResizeSettings(stored=args.stored, filter=args.filter, quality=args.quality), args.seed, args.shard_samples
    )
    source = open_source(args.source)
    if args.split and args.split not in source.splits():
        raise ValueError(f"{args.source}: layout {source.layout} without split {args.split!r}, found {source.splits()}")
    make = repair_split if args.repair else make_split
    record: dict[str, object] = {"layout": source.layout}
    for split in [args.split] if args.split else source.splits():
        listing = source.listing(split)
        print(f"{split}: {len(listing.items):,} images of {len(listing.classes)} classes, layout {listing.layout}")
        limit = args.max_quarantine
        if limit is None:
            limit = max(QUARANTINE_FLOOR, int(QUARANTINE_SHARE * len(listing.items)))
        there = (args.out / split).exists()  # then the time is not that of making it
        started_s = time.monotonic()
        try:
            with Progress(f"sharding {split}", len(listing.items)) as progress:
                manifest = make(listing, args.out, settings, args.workers, limit, progress)
        except OverQuarantine as error:
            print(f"make_shards.py: {error}", file=sys.stderr)
            return 1
        took_s = None if there else time.monotonic() - started_s
        record[split] = report(manifest, args.out / split, took_s, args.workers)
    write_json(args.json, record)
    return 0


def check(args: argparse.Namespace) -> int:
    """`--verify`: prints every fault of every split in OUT; 1 if there is any."""
    splits = [args.split] if args.split else [split for split in SPLITS if (args.out / split).is_dir()]
    if not splits or not all((args.out / split).is_dir() for split in splits):
        raise ValueError(f"{args.out}: no {' or '.join(splits or SPLITS)} folder here; expected what make_shards wrote")
    record = {}
    for split in splits:
        folder = args.out / split
        with Progress(f"verifying {split}", None) as progress, executor_of(args.workers, verify.__module__) as executor:
            faults = verify(folder, args.deep, executor, progress)
        for fault in faults:
            print(f"{folder}: {fault}")
        print(f"{folder}: {f'{len(faults)} faults; --repair rebuilds them' if faults else 'as it was written'}")
        record[split] = [asdict(fault) for fault in faults]
    write_json(args.json, record)
    return 1 if any(record.values()) else 0


def report(manifest: Manifest, folder: Path, took_s: float | None, workers: int) -> dict[str, object]:
    """Prints what became of a split, which took `took_s` (None: some was there); returns it for `--json`."""
    total = sum(shard.bytes for shard in manifest.shards)
    rate = manifest.samples / took_s if took_s else None
    how = f"{took_s:.1f} s, {rate:,.0f} img/s ({rate / workers:,.0f} a worker)" if rate else "whole"
    print(f"{folder}: {manifest.samples:,} samples in {len(manifest.shards)} shards, {total / 1e6:,.1f} MB; {how}")
    for entry in manifest.quarantined:
        print(f"  quarantined {entry.key}: {entry.reason}")
    return {
        "folder": str(folder),
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": total,
        "img_s": rate,
        "workers": workers,
        "quarantined": {entry.key: entry.reason for entry in manifest.quarantined},
    }


if __name__ == "__main__":
    run(main)
