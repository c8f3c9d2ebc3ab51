"""Computes the RGB eigenbasis and the mean image of a shard set, decoding every pixel.

    python tools/compute_pca.py data/imagenet-256/train

Writes SHARDS/eigenbasis.json (or --out) and mean_image.npy beside it; prints the basis and warns where the data looks
unlike photographs. Any number of workers gives the same bits. Exits with 2 on wrong input.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from cli import Progress, run, write_json

from pipeline import eigenbasis
from pipeline.shards import open_shards


def main() -> int:
    """Measures, checks, saves and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: SHARDS/eigenbasis.json")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what the screen says")
    args = parser.parse_args()
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}, expected at least 1")
    with Progress("hashing tars", None, "B") as hashing:
        shards = open_shards(args.shards, hashing)
    with Progress("eigenbasis", len(shards)) as progress:
        basis = eigenbasis.measure(shards, args.workers, progress)
    warnings = eigenbasis.check(basis)
    out = args.out or args.shards / "eigenbasis.json"
    eigenbasis.save(basis, out)
    print(f"{out}: {len(shards):,} pictures, {basis.pixels:,} pixels, grey levels of 0..255")
    print(f"  mean (R, G, B)       {np.array2string(basis.mean, precision=3)}")
    for number in range(3):
        vector = np.array2string(basis.eigenvectors[:, number], precision=4, sign=" ")
        print(f"  stdev {basis.stdevs[number]:8.3f}  along  {vector}")
    for line in warnings:
        print(f"  warning: {line}")
    write_json(args.json, {"out": str(out), "warnings": warnings, **eigenbasis.record(basis)})
    return 0


if __name__ == "__main__":
    run(main)
