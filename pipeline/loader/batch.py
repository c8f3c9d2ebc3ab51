"""A batch of the data loader, whichever library made it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from pipeline.loader.inputs import BatchInputs


@dataclass(frozen=True)
class Batch:
    """A batch of N samples; all tensors are on the loader's device.

    Attributes:
        images: float32 (N, 3, 224, 224), or (N, views, 3, 224, 224) from `view_loader`. With `crops_only` uint8
            (N, 224, 224, 3), which `TrainLoader.finish` makes images of.
        labels: int64 (N,) class indices.
        ids: int64 (N,) sample ids.
        epoch: counts from 0.
        step: counts from 0 in each epoch.
        left_out: the damaged samples that `view_loader` left out of this batch: the place and the reason of each.
        rows: with `crops_only` float32 (N, 5), what `finish` needs of each sample.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    epoch: int
    step: int
    left_out: tuple[str, ...] = ()
    rows: torch.Tensor | None = None


class TrainBatches(Protocol):
    """One rank's endless training batches, as a library makes them."""

    def next(self) -> Batch:
        """The next batch. Raises ValueError if the loader is closed or an image cannot be decoded."""

    def close(self) -> None:
        """Stops threads and processes. Batches that were returned stay valid."""


def without_substitutes(batch: Batch, inputs: BatchInputs) -> Batch:
    """The batch without the rows of substitutes: evaluation must not score them."""
    if not inputs.substituted:
        return batch
    rows = [row for row in range(len(inputs.ids)) if row not in inputs.substituted]
    kept = torch.tensor(rows, dtype=torch.int64, device=batch.images.device)
    images, labels, ids = batch.images[kept], batch.labels[kept], batch.ids[kept]
    return replace(batch, images=images, labels=labels, ids=ids, left_out=tuple(inputs.damaged.values()))
