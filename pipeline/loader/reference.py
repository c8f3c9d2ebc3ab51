"""A plain version of the loader, to check its batches: Pillow decodes, NumPy crops, mirrors and normalises."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.loader.augment import Floats, draw, mean_of, reference_train
from pipeline.loader.loader import TrainLoader
from pipeline.loader.order import Ids
from pipeline.loader.settings import LoaderSettings
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet


def reference_batch(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, epoch: int, ids: Ids
) -> tuple[Floats, float]:
    """The images that a loader must give in `epoch` for the samples `ids` (N,).

    Returns:
        Images (N, 3, 224, 224), and the number by which they were divided. A difference between images times this
        number is in pixel values 0-255.
    """
    draws = draw(settings.seed, epoch, ids, settings.positions)
    offsets, divisor = settings.lighting_at(epoch).offsets_and_divisor(draws.normals, basis)
    mean = mean_of(basis, settings.mean)
    rows = zip(shards.jpegs(ids), draws.top, draws.left, draws.mirror, offsets, strict=True)
    images = [
        reference_train(_pixels(jpeg), top, left, mirror, offset, divisor, mean)
        for jpeg, top, left, mirror, offset in rows
    ]
    return np.stack(images), divisor


def _pixels(jpeg: NDArray[np.uint8]) -> NDArray[np.uint8]:
    with Image.open(BytesIO(jpeg.tobytes())) as image:
        return np.asarray(image)


@dataclass(frozen=True)
class Compared:
    """The first batches of a loader against the reference.

    Attributes:
        mean_pixel_difference: mean absolute difference of all images, in pixel values 0-255.
        worst_image_pixel_difference: mean absolute difference of the worst image, in pixel values 0-255.
        labels_right: whether every label is the sample's own.
        same_again: whether a second loader gave the same images and ids, bit for bit.
    """

    mean_pixel_difference: float
    worst_image_pixel_difference: float
    labels_right: bool
    same_again: bool

    def within(self, pixel_difference: float) -> bool:
        """Whether the mean difference is below `pixel_difference`, labels are right and the batches repeat."""
        return self.labels_right and self.same_again and self.mean_pixel_difference < pixel_difference


def compared(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, batches: int = 2) -> Compared:
    """Runs a loader twice for `batches` batches, and compares it with the reference and with itself."""
    runs, differences, labels_right = [], [], True
    for _ in range(2):
        with TrainLoader(shards, basis, settings) as loader:
            taken = islice(loader, batches)
            runs.append([(b.images.numpy(force=True), b.ids.numpy(force=True), b.labels, b.epoch) for b in taken])
    for images, ids, labels, epoch in runs[0]:
        expected, divisor = reference_batch(shards, basis, settings, epoch, ids)
        differences.append(divisor * np.abs(images - expected).mean(axis=(1, 2, 3)))
        labels_right &= np.array_equal(shards.index["label"][ids], labels.numpy(force=True))
    same = all(np.array_equal(one[part], two[part]) for one, two in zip(*runs, strict=True) for part in (0, 1))
    return Compared(float(np.mean(differences)), float(np.max(differences)), labels_right, same)
