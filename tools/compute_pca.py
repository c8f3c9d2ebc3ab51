"""Computes the RGB eigenbasis and the mean image of a shard set by principal component analysis (PCA) of every pixel.

    python tools/compute_pca.py data/imagenet-256/train
    python tools/compute_pca.py /shared/imagenet-256/train --engine tcp://host:8786    # run on a Dask cluster

Writes the eigenbasis (JSON) and mean_image.npy into SHARDS, prints the eigenbasis, and warns if the data is unlike
photographs. Any number of workers gives the same bits. Exit codes: 0 success; 2 wrong input.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from tools.shared import ctrl_c

    ctrl_c.end_at_once()

import argparse
from pathlib import Path

from tools.shared.cli import Progress, add_workers, chosen_workers, json_path, preload_workers, run, write_json

RGB_PCA = "pipeline.rgb_pca"


def main() -> int:
    """Measures, checks, saves and prints the eigenbasis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="one split's shard set, usually train")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON file; default: in SHARDS")
    add_workers(parser)
    parser.add_argument("--json", type=json_path, metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args()

    preload_workers(args, RGB_PCA)
    # Imported here, so that --help answers at once.
    from pipeline.workers import import_quickly

    import_quickly(RGB_PCA)
    import numpy as np

    from pipeline import rgb_pca
    from pipeline.shards.reader import open_shards

    with Progress("hashing tars", None, "B") as hashing:
        # The cluster's workers may have other working directories.
        shards = open_shards(args.shards.resolve() if args.engine else args.shards, hashing)
    with chosen_workers(args, RGB_PCA) as workers, Progress("eigenbasis", len(shards)) as progress:
        basis = rgb_pca.measure(shards, workers, progress)
    warnings = rgb_pca.check(basis)
    out = args.out or rgb_pca.eigenbasis_path(args.shards)
    rgb_pca.save(basis, out)
    print(f"{out}: {len(shards):,} images, {basis.pixels:,} pixels; unit: pixel values 0-255")
    print(f"  mean (R, G, B)       {np.array2string(basis.mean, precision=3)}")
    for number in range(3):
        vector = np.array2string(basis.eigenvectors[:, number], precision=4, sign=" ")
        print(f"  stdev {basis.stdevs[number]:8.3f}  along  {vector}")
    for line in warnings:
        print(f"  warning: {line}")
    write_json(args.json, {"out": str(out), "warnings": warnings, **rgb_pca.record(basis)})
    return 0


if __name__ == "__main__":
    run(main)
