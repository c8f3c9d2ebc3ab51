"""What bench_pca measures: compute_pca's pass over a shard set, and other ways to decode and sum the same samples.

Every way does one pass with the same workers and the same division into jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from pipeline import rgb_pca
from pipeline.rgb_pca import MEAN_IMAGE_SIDE, Moments, map_samples, open_in_worker
from pipeline.shards.reader import ShardSet
from pipeline.workers import Workers, ignore

OURS, BARE, PILLOW = "compute_pca", "libjpeg-turbo alone", "Pillow, float64 sums"


def passes(shards: ShardSet, workers: Workers) -> dict[str, Callable[[], Iterator[int]]]:
    """For each way an endless iterator that does a pass over the set and yields its number of images."""
    return {
        OURS: lambda: _repeat(lambda: rgb_pca.measure(shards, workers, ignore), shards),
        BARE: lambda: _repeat(lambda: sum(map_samples(decode_only, shards, workers)), shards),
        PILLOW: lambda: _repeat(lambda: pillow_moments(shards, workers), shards),
    }


def _repeat(one_pass: Callable[[], object], shards: ShardSet) -> Iterator[int]:
    while True:
        one_pass()
        yield len(shards)


def decode_only(folder: Path, manifest_sha256: str, ids: np.ndarray) -> int:
    """Decodes samples with libjpeg-turbo and does nothing else. Runs in a worker.

    Returns:
        Number of pixels.
    """
    jpegs = open_in_worker(folder, manifest_sha256).jpegs(ids)
    return sum(simplejpeg.decode_jpeg(jpeg, "RGB").size // 3 for jpeg in jpegs)


def pillow_moments(shards: ShardSet, workers: Workers) -> Moments:
    """The same moments as compute_pca's, by Pillow and NumPy."""
    parts = list(map_samples(_pillow_job, shards, workers))
    return sum(parts[1:], parts[0])


def _pillow_job(folder: Path, manifest_sha256: str, ids: np.ndarray) -> Moments:
    """Decodes with Pillow and sums in float64, which is exact up to 2**53. Runs in a worker."""
    side, pixels = MEAN_IMAGE_SIDE, 0
    sums, products, image_sums = np.zeros(3), np.zeros((3, 3)), np.zeros((side, side, 3))
    for jpeg in open_in_worker(folder, manifest_sha256).jpegs(ids):
        with Image.open(BytesIO(jpeg.data)) as opened:
            image = np.asarray(opened)
        flat = image.reshape(-1, 3).astype(np.float64)
        sums += flat.sum(axis=0)
        products += flat.T @ flat
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        image_sums += image[top : top + side, left : left + side]
        pixels += len(flat)
    return Moments(len(ids), pixels, *(part.astype(np.int64) for part in (sums, products, image_sums)))
