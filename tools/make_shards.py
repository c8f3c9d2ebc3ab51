"""Turns ImageNet into shard sets: OUT/train and OUT/val, one folder per split that SOURCE holds.

    python tools/make_shards.py /data/imagenet data/imagenet-256

SOURCE is a folder in any layout that ImageNet comes in, recognised by itself and read where it is, never unpacked:

    ilsvrc      ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz
    kaggle      ILSVRC/Data/CLS-LOC/{train,val} and LOC_val_solution.csv
    parquet     Hugging Face's train-*.parquet and validation-*.parquet
    webdataset  tars of KEY.jpg and KEY.cls
    folders     train/<wnid>/*.JPEG and val/<wnid>/*.JPEG

Pictures get a short side of 256. The same command after an interruption goes on where it stopped; over a finished set
it does nothing. Prints a line per split, and what the work was bound by.

    python tools/make_shards.py data/imagenet-256 --verify            # every hash and index row; --deep: every picture
    python tools/make_shards.py /data/imagenet data/imagenet-256 --repair   # rebuilds what is damaged, byte for byte
    python tools/make_shards.py /shared/in /shared/out --engine tcp://host:8786     # shared out by a Dask cluster

Exits with 1 when more pictures than --max-quarantine cannot be decoded or --verify finds a fault, with 2 on wrong
input.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from pipeline.imagenet.listing import SPLITS
from pipeline.imagenet.source import LAYOUTS, open_source
from pipeline.shards.bottleneck import bound_by
from pipeline.shards.build import Outcome, ShardSettings, TooManyQuarantined, make_split, repair_split
from pipeline.shards.transcode import FILTERS, STORED_SHAPES, SUBSAMPLINGS, ResizeSettings
from pipeline.shards.verify import verify
from pipeline.workers import Workers
from tools.shared.cli import Progress, add_workers, chosen_workers, cores, run, write_json

QUARANTINE_SHARE = 0.001
QUARANTINE_FLOOR = 10  # a small set may hold a few bad images too


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", nargs="?", help="not needed for --verify")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--layout", choices=LAYOUTS, help="of SOURCE (default: recognised)")
    parser.add_argument("--split", choices=SPLITS, help="only this split (default: every split that SOURCE holds)")
    default, resize = ShardSettings(), ResizeSettings()
    parser.add_argument("--stored", choices=STORED_SHAPES, default=resize.stored, help="default: %(default)s")
    parser.add_argument("--filter", choices=FILTERS, default=resize.filter, help="default: %(default)s")
    parser.add_argument("--quality", type=int, default=resize.quality, help="of the JPEGs; default: %(default)s")
    parser.add_argument("--subsampling", choices=SUBSAMPLINGS, default=resize.subsampling, help="default: %(default)s")
    parser.add_argument("--apply-exif", action="store_true", help="turn pictures as their cameras say")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the samples' order; default: %(default)s")
    parser.add_argument("--shard-samples", type=int, default=default.shard_samples, help="default: %(default)s")
    add_workers(parser)
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
    if args.deep and not args.verify:
        raise ValueError("--deep without --verify; add --verify")
    if args.source is None and not args.verify:
        raise ValueError("one folder given, expected SOURCE and OUT (only --verify does without SOURCE)")
    if args.engine:  # other machines have other working folders
        args.out, args.source = args.out.resolve(), args.source and args.source.resolve()
    with chosen_workers(args, make_split.__module__) as workers:
        return check(args, workers) if args.verify else make(args, workers)


def make(args: argparse.Namespace, workers: Workers) -> int:
    """Shards or repairs; 1 where too many pictures cannot be decoded."""
    resize = ResizeSettings(
        stored=args.stored,
        filter=args.filter,
        quality=args.quality,
        subsampling=args.subsampling,
        apply_exif=args.apply_exif,
    )
    settings = ShardSettings(resize, args.seed, args.shard_samples)
    source = open_source(args.source, args.layout)
    if args.split and args.split not in source.splits():
        raise ValueError(f"{args.source}: layout {source.layout} without split {args.split!r}, found {source.splits()}")
    make_or_repair = repair_split if args.repair else make_split
    record: dict[str, object] = {"layout": source.layout}
    for split in [args.split] if args.split else source.splits():
        listing = source.listing(split)
        print(f"{split}: {len(listing.items):,} images of {len(listing.classes)} classes, layout {listing.layout}")
        limit = args.max_quarantine
        if limit is None:
            limit = max(QUARANTINE_FLOOR, int(QUARANTINE_SHARE * len(listing.items)))
        started_s = time.monotonic()
        try:
            with Progress(f"sharding {split}", len(listing.items)) as progress:
                outcome = make_or_repair(listing, args.out, settings, workers, limit, progress)
        except TooManyQuarantined as error:
            print(f"make_shards.py: {error}", file=sys.stderr)
            return 1
        record[split] = report(outcome, args.out / split, time.monotonic() - started_s, workers.count)
    write_json(args.json, record)
    return 0


def check(args: argparse.Namespace, workers: Workers) -> int:
    """`--verify`: prints every fault of every split in OUT; 1 if there is any."""
    splits = [args.split] if args.split else [split for split in SPLITS if (args.out / split).is_dir()]
    if not splits or not all((args.out / split).is_dir() for split in splits):
        raise ValueError(f"{args.out}: no {' or '.join(splits or SPLITS)} folder here; expected what make_shards wrote")
    record = {}
    for split in splits:
        folder = args.out / split
        with Progress(f"verifying {split}", None) as progress:
            faults = verify(folder, args.deep, workers, progress)
        for fault in faults:
            print(f"{folder}: {fault}")
        print(f"{folder}: {f'{len(faults)} faults; --repair rebuilds them' if faults else 'as it was written'}")
        record[split] = [asdict(fault) for fault in faults]
    write_json(args.json, record)
    return 1 if any(record.values()) else 0


def report(outcome: Outcome, folder: Path, took_s: float, workers: int) -> dict[str, object]:
    """Prints what became of a split, and what the work on it was bound by; returns it for `--json`."""
    manifest = outcome.manifest
    total = sum(shard.bytes for shard in manifest.shards)
    whole = outcome.written == len(manifest.shards)  # else the time is not that of making it
    rate = manifest.samples / took_s if whole else None
    how = f"{took_s:.1f} s, {rate:,.0f} img/s ({rate / workers:,.0f} a worker)" if rate else "whole"
    print(f"{folder}: {manifest.samples:,} samples in {len(manifest.shards)} shards, {total / 1e6:,.1f} MB; {how}")
    bound = bound_by(outcome.busy, took_s, workers, cores(), outcome.written) if outcome.written else None
    if bound:
        print(f"  {bound}")
    for entry in manifest.quarantined:
        print(f"  quarantined {entry.key}: {entry.reason}")
    return {
        "folder": str(folder),
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": total,
        "img_s": rate,
        "workers": workers,
        "bound_by": asdict(bound) if bound else None,
        "quarantined": {entry.key: entry.reason for entry in manifest.quarantined},
    }


if __name__ == "__main__":
    run(main)
