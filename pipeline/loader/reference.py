"""The feed's batches made again by the plain road: Pillow decodes, NumPy crops, mirrors and lights."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.loader.augment import Floats, draw, mean_of, reference_train
from pipeline.loader.loader import TrainLoader
from pipeline.loader.settings import LoaderSettings
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet


def reference_batch(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, epoch: int, ids: NDArray[np.int64]
) -> tuple[Floats, float]:
    """Images (N, 3, 224, 224) that a feed must give in `epoch` for the samples `ids` (N,), and what they were divided
    by: differences times that are in grey levels."""
    draws = draw(settings.seed, epoch, ids, settings.positions)
    offsets, divisor = settings.lighting_at(epoch).colour(draws.normals, basis)
    mean = mean_of(basis, settings.mean)
    rows = zip(shards.jpegs(ids), draws.top, draws.left, draws.mirror, offsets, strict=True)
    made = [reference_train(_pixels(jpeg), top, left, flip, lit, divisor, mean) for jpeg, top, left, flip, lit in rows]
    return np.stack(made), divisor


def _pixels(jpeg: NDArray[np.uint8]) -> NDArray[np.uint8]:
    with Image.open(BytesIO(jpeg.tobytes())) as picture:
        return np.asarray(picture)


@dataclass(frozen=True)
class Compared:
    """The first batches of a feed against the reference: mean absolute difference in grey levels, that of the worst
    image, whether labels are their samples', and whether another feed gave the same bits."""

    grey_levels: float
    worst_image: float
    labels_right: bool
    same_again: bool

    def within(self, grey_levels: float) -> bool:
        """Whether all is right, and less apart than that in the mean."""
        return self.labels_right and self.same_again and self.grey_levels < grey_levels


def compared(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, batches: int = 2) -> Compared:
    """Runs a feed twice and compares."""
    runs, off, labels_right = [], [], True
    for _ in range(2):
        with TrainLoader(shards, basis, settings) as feed:
            taken = islice(feed, batches)
            runs.append([(b.images.numpy(force=True), b.ids.numpy(force=True), b.labels, b.epoch) for b in taken])
    for images, ids, labels, epoch in runs[0]:
        expected, divisor = reference_batch(shards, basis, settings, epoch, ids)
        off.append(divisor * np.abs(images - expected).mean(axis=(1, 2, 3)))
        labels_right &= np.array_equal(shards.index["label"][ids], labels.numpy(force=True))
    same = all(np.array_equal(one[part], two[part]) for one, two in zip(*runs, strict=True) for part in (0, 1))
    return Compared(float(np.mean(off)), float(np.max(off)), labels_right, same)
