"""Turns ImageNet into shard sets: OUT/train and OUT/val, one folder per split that SOURCE holds.

    python tools/make_shards.py /data/imagenet data/imagenet-256

SOURCE is a folder in any layout in which ImageNet is distributed. The layout is detected, and files are read in place,
without unpacking:

    ilsvrc      ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz
    kaggle      ILSVRC/Data/CLS-LOC/{train,val} and LOC_val_solution.csv
    parquet     Hugging Face's train-*.parquet and validation-*.parquet
    webdataset  tars of KEY.jpg and KEY.cls
    folders     train/<wnid>/*.JPEG and val/<wnid>/*.JPEG

Each split is read from where it is, so train may be in class folders beside the tar of val. Before any work, the tool
prints the plan: what each split is read from, what is skipped, and what in SOURCE is not used. A split that seems to be
there but cannot be read, or that can be read in two ways, is refused with the fix. All splits have one list of classes.

Images are resized to a short side of 256. After an interruption, the same command continues where the run stopped; on a
finished set it changes nothing. Prints a line per split and the bottleneck of the run.

    python tools/make_shards.py data/imagenet-256 --verify            # check every hash and index row
    python tools/make_shards.py data/imagenet-256 --verify --deep     # also decode every image
    python tools/make_shards.py /data/imagenet data/imagenet-256 --repair   # rebuild damaged shards to the same bytes
    python tools/make_shards.py /shared/in /shared/out --engine tcp://host:8786     # run on a Dask cluster
    python tools/make_shards.py /shared/in /shared/out --part 2/16                  # a share of the work

Parts run in any order and on any machines that share OUT, without a connection. The part that ends last publishes the
set. Repeat a part that was stopped; without --part the command makes all that is missing.

Exit codes: 0 success; 1 more images than --max-quarantine cannot be decoded or have no label, or --verify found a
fault; 2 wrong input.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from tools.shared import ctrl_c

    ctrl_c.end_at_once()

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

# Modules that import numpy, scipy or torch are imported inside functions, so that --help answers at once.
from pipeline.shards.settings import (
    FILTERS,
    MAX_SHARD_SAMPLES,
    MIN_SHARDS,
    STORED_SHAPES,
    SUBSAMPLINGS,
    ResizeSettings,
    ShardSettings,
)
from tools.shared.cli import (
    Progress,
    add_workers,
    chosen_workers,
    json_path,
    preload_workers,
    run,
    write_json,
)

if TYPE_CHECKING:
    from pipeline.imagenet.listing import Listing
    from pipeline.imagenet.source import Source
    from pipeline.shards.build import Outcome
    from pipeline.shards.parts import Part, PartOutcome
    from pipeline.workers import Workers

JOB_MODULES = ("pipeline.shards.job", "torch")  # what workers import
MAX_QUARANTINE_SHARE = 0.001
CLASS_LIST_HELP = "text file with a wnid per line: all classes, if SOURCE holds only some; keeps ImageNet's 1000 labels"
SHARD_SAMPLES_HELP = (
    f"images per shard; default: {MAX_SHARD_SAMPLES}, fewer if that gives less than {MIN_SHARDS} shards"
)
MIN_MAX_QUARANTINE = 10  # images; in a small set, a few bad images are a larger share
SHOWN_QUARANTINED = 10  # on the screen


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", nargs="?", help="not needed for --verify")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shard sets")
    parser.add_argument("--layout", metavar="NAME", help="layout of SOURCE, as listed above; default: detect it")
    parser.add_argument("--class-list", type=Path, metavar="FILE", help=CLASS_LIST_HELP)
    parser.add_argument("--image-column", metavar="NAME", help="of parquet files; default: find it")
    parser.add_argument("--label-column", metavar="NAME", help="of parquet files; default: find it")
    parser.add_argument("--split", metavar="NAME", help="only train or only val; default: every split in SOURCE")
    resize, shard = ResizeSettings(), ShardSettings()
    add = parser.add_argument
    add("--stored", choices=STORED_SHAPES, default=resize.stored, help="whole or centre; default: %(default)s")
    add("--filter", choices=FILTERS, default=resize.filter, help="for resizing; default: %(default)s")
    add("--quality", type=int, default=resize.quality, help="of the JPEGs, 1 to 100; default: %(default)s")
    add("--subsampling", choices=SUBSAMPLINGS, default=resize.subsampling, help="of chroma; default: %(default)s")
    add("--apply-exif", action="store_true", help="rotate images as their EXIF orientation says")
    add("--seed", type=int, default=shard.seed, help="of the order of samples; default: %(default)s")
    add("--shard-samples", type=int, metavar="N", help=SHARD_SAMPLES_HELP)
    add_workers(parser)
    default_limit = f"1 in {1 / MAX_QUARANTINE_SHARE:,.0f}, but at least {MIN_MAX_QUARANTINE}"
    quarantine_help = f"images that may be undecodable; default: {default_limit}"
    parser.add_argument("--max-quarantine", type=int, metavar="N", help=quarantine_help)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--verify", action="store_true", help="check the shard sets in OUT and name every fault")
    mode.add_argument("--repair", action="store_true", help="rebuild damaged or missing shards of OUT from SOURCE")
    parser.add_argument("--part", metavar="I/N", help="do part I of N of the work; the last part publishes the set")
    parser.add_argument("--deep", action="store_true", help="with --verify: also decode every image")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="also write the results to FILE")
    return parser.parse_args()


def main() -> int:
    """Makes, verifies or repairs the shard set of each split."""
    args = parse()
    if args.deep and not args.verify:
        raise ValueError("--deep without --verify; add --verify")
    if args.part is not None and (args.verify or args.repair):
        mode = "--verify" if args.verify else "--repair"
        raise ValueError(f"--part {args.part} with {mode}, which works on the whole set; omit --part")
    if args.source is None and not args.verify:
        raise ValueError("one folder given, expected SOURCE and OUT (only --verify needs no SOURCE)")
    if args.engine:  # the cluster's workers may have other working directories
        args.out, args.source = args.out.resolve(), args.source and args.source.resolve()
    return verify(args) if args.verify else make(args)


def make(args: argparse.Namespace) -> int:
    """Makes or repairs the shard sets. Returns 1 if too many images cannot be decoded."""
    from pipeline.workers import import_quickly

    settings = settings_of(args)
    part_of(args)  # before any work
    preload_workers(args, *JOB_MODULES)
    import_quickly("pipeline.shards.parts")  # before workers run: from then on Ctrl-C is an exception
    source = source_of(args)
    check_out(args.out, args.source, source)
    listings = [source.listing(split) for split in ([args.split] if args.split else source.splits())]
    print("\n".join(source.plan(listings)), flush=True)
    with chosen_workers(args, *JOB_MODULES) as workers:
        return make_splits(args, settings, source.layout, listings, workers)


def make_splits(
    args: argparse.Namespace, settings: ShardSettings, layout: str, listings: list[Listing], workers: Workers
) -> int:
    """Makes or repairs the shard set of each listing. Returns 1 if too many images cannot be decoded."""
    from pipeline.shards.build import TooManyQuarantined
    from tools.shared.shard_report import report

    part = part_of(args)
    record: dict[str, object] = {"layout": layout}
    for listing in listings:
        split = listing.split
        started_s = time.monotonic()
        try:
            limit = quarantine_limit(args.max_quarantine, listing)
            outcome = make_one(args, settings, listing, workers, limit, part)
        except TooManyQuarantined as error:
            print(f"make_shards.py: {error}", file=sys.stderr)
            for entry in error.quarantined[:SHOWN_QUARANTINED]:
                print(f"  {entry.key}: {entry.reason}", file=sys.stderr)
            if (more := len(error.quarantined) - SHOWN_QUARANTINED) > 0:
                print(f"  and {more} more; --json FILE lists all", file=sys.stderr)
            failed = {"error": str(error), "quarantined": {entry.key: entry.reason for entry in error.quarantined}}
            write_json(args.json, {**record, split: failed})
            return 1
        took_s = time.monotonic() - started_s
        result = report(outcome, part, args.out / split, took_s, workers.count)
        record[split] = {**result, **listing_record(listing)}
    write_json(args.json, record)
    return 0


def make_one(
    args: argparse.Namespace, settings: ShardSettings, listing: Listing, workers: Workers, limit: int, part: Part | None
) -> Outcome | PartOutcome:
    """Makes or repairs one shard set, or makes a part of it."""
    from pipeline.shards.build import make_split, repair_split
    from pipeline.shards.parts import make_part, part_images

    images = part_images(listing, settings, part) if part else len(listing.items)
    what = f"sharding {listing.split}" + (f", part {part}" if part else "")
    with Progress(what, images) as progress:
        if part:
            return make_part(listing, args.out, settings, workers, limit, progress, part)
        make_or_repair = repair_split if args.repair else make_split
        return make_or_repair(listing, args.out, settings, workers, limit, progress)


def part_of(args: argparse.Namespace) -> Part | None:
    """The part that `--part` names."""
    if args.part is None:
        return None
    from pipeline.shards.parts import Part

    return Part.parse(args.part)


def source_of(args: argparse.Namespace) -> Source:
    """Opens SOURCE with the options that say how to read it."""
    from pipeline.imagenet.listing import SPLITS
    from pipeline.imagenet.source import ColumnNames, open_source, read_class_list

    if args.split not in (None, *SPLITS):
        raise ValueError(f"--split {args.split}, expected one of {', '.join(SPLITS)}")
    class_list = read_class_list(args.class_list) if args.class_list else None
    columns = ColumnNames(args.image_column, args.label_column)
    source = open_source(args.source, args.layout, args.split, columns, class_list)
    if args.split and args.split not in source.splits():
        raise ValueError(f"{args.source}: layout {source.layout} without split {args.split!r}, found {source.splits()}")
    return source


def check_out(out: Path, given: Path, source: Source) -> None:
    """Raises ValueError if the next run would take OUT for a part of SOURCE, or if OUT is no folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, expected a folder for the shard sets; choose another OUT")
    folder, read = out.resolve(), {path.resolve() for part in source.parts.values() for path in part.uses}
    beside = {path.parent for path in read if path.is_dir()}
    above, root = given.resolve(), source.root.resolve()
    in_the_way = folder.is_relative_to(above) and not folder.is_relative_to(root)  # SOURCE would have two folders
    inside = (
        folder in {above, root, *beside} or folder.parent in beside or not read.isdisjoint((folder, *folder.parents))
    )
    if inside or in_the_way:
        raise ValueError(f"{out}: in the source, where the next run would take it for a part of it; choose another OUT")


def quarantine_limit(given: int | None, listing: Listing) -> int:
    """How many images of a listing may be undecodable or without a usable label."""
    images = len(listing.items) + len(listing.unusable)
    return max(MIN_MAX_QUARANTINE, int(MAX_QUARANTINE_SHARE * images)) if given is None else given


def listing_record(listing: Listing) -> dict[str, object]:
    """What `--json` says about the source of a split."""
    return {
        "skipped": {skipped.reason: skipped.count for skipped in listing.skipped},
        "skipped_examples": {skipped.reason: list(skipped.examples) for skipped in listing.skipped},
        "unusable": {image.key: image.reason for image in listing.unusable},
        "originals": dict(listing.originals),
        "classes_without_images": listing.classes_without_images(),
    }


def settings_of(args: argparse.Namespace) -> ShardSettings:
    """The settings that the command line asks for."""
    resize = ResizeSettings(
        stored=args.stored,
        filter=args.filter,
        quality=args.quality,
        subsampling=args.subsampling,
        apply_exif=args.apply_exif,
    )
    return ShardSettings(resize, args.seed, args.shard_samples)


def verify(args: argparse.Namespace) -> int:
    """Prints every fault of every split in OUT. Returns 1 if there is any."""
    from pipeline.imagenet.listing import SPLITS
    from pipeline.shards import verify as verification

    splits = [args.split] if args.split else [split for split in SPLITS if (args.out / split).is_dir()]
    if not splits or not all((args.out / split).is_dir() for split in splits):
        expected = " or ".join(splits or SPLITS)
        raise ValueError(f"{args.out}: no {expected} folder here; expected an OUT folder of make_shards")
    record = {}
    for split in splits:
        folder = args.out / split
        with chosen_workers(args, verification.__name__) as workers, Progress(f"verifying {split}", None) as progress:
            faults = verification.verify(folder, args.deep, workers, progress)
        for fault in faults:
            print(f"{folder}: {fault}")
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}; --repair rebuilds what is damaged"
        print(f"{folder}: {count if faults else 'intact, as it was written'}")
        record[split] = [asdict(fault) for fault in faults]
    write_json(args.json, record)
    return 1 if any(record.values()) else 0


if __name__ == "__main__":
    run(main)
