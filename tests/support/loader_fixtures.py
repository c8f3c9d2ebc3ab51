"""Helpers of the loader's tests: small settings, batches taken from a loader, their reference and their hash."""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import Any

import torch

from pipeline.loader.augment import Floats
from pipeline.loader.loader import Batch, TrainLoader
from pipeline.loader.reference import reference_batch
from pipeline.loader.settings import LoaderSettings
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

SAMPLES, BATCH, STEPS = 27, 8, 3  # three batches and a tail of three samples
MAX_PIXEL_DIFFERENCE = 1e-3  # between the loader and the reference, in pixel values 0-255


def settings(**changes: Any) -> LoaderSettings:
    """Batches of 8 on two threads, with `changes`."""
    return LoaderSettings(**{"batch": BATCH, "threads": 2, **changes})


def take(shards: ShardSet, basis: Eigenbasis, number: int, how: LoaderSettings, **start: int) -> list[Batch]:
    """The first `number` batches of a new loader."""
    with TrainLoader(shards, basis, how, **start) as loader:
        return list(islice(loader, number))


def expected_images(shards: ShardSet, basis: Eigenbasis, how: LoaderSettings, batch: Batch) -> Floats:
    """The reference images (N, 3, 224, 224) of a batch's samples."""
    return reference_batch(shards, basis, how, batch.epoch, batch.ids.numpy(force=True))[0]


def digest(batch: Batch) -> str:
    """A hash of the images, labels and ids of a batch."""
    parts = (batch.images, batch.labels, batch.ids)
    return hashlib.sha256(b"".join(part.numpy(force=True).tobytes() for part in parts)).hexdigest()


def assert_parts_make_the_batch(batch: Batch, parts: list[Batch]) -> None:
    """Checks that the ranks' parts, concatenated in rank order, are the global batch."""
    assert {(part.epoch, part.step) for part in parts} == {(batch.epoch, batch.step)}
    for name in ("images", "labels", "ids"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts]))
