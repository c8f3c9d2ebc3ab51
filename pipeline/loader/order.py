"""Which samples at which step: pure functions of (seed, epoch), the same on any number of ranks. NumPy only.

Sample ids are int64 row numbers of the shard set's index. Training visits a random permutation of them in global
batches and drops the tail that does not fill one; evaluation visits 0 to n - 1, every sample exactly once. Of the
permutations `epoch_order` is uniform over the whole set; `windowed_order` is for storage that is slow to seek and a set
that memory does not hold: it keeps to a few shards at a time. `shuffle_quality` says what that costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.philox import Purpose, random_keys

Order = Literal["global", "windowed"]


def windowed_order(shards: NDArray[Any], seed: int, epoch: int, window_shards: int) -> NDArray[np.int64]:
    """The permutation (N,) of 0 to N - 1 that takes `window_shards` shards at a time, in a random order of the shards,
    and shuffles all their samples. `shards` (N,) has each sample's shard, 0 and up.

    Every shard is read in one window only. With all shards in one window this is `epoch_order`.
    """
    places = np.argsort(np.argsort(random_keys(int(shards.max()) + 1, seed, epoch, Purpose.SHARDS), kind="stable"))
    return np.lexsort((random_keys(len(shards), seed, epoch, Purpose.ORDER), places[shards] // window_shards))


@dataclass(frozen=True)
class ShuffleQuality:
    """How an order compares with a uniform permutation, for which each of these is 1 in expectation.

    distance: how far apart two samples are visited that are stored side by side, on average.
    shards: how many different shards a batch draws from, on average; labels: how many different classes it has.
    """

    distance: float
    shards: float
    labels: float

    def __str__(self) -> str:
        return (
            f"neighbours {self.distance:.2f} as far apart, {self.shards:.2f} as many shards and"
            f" {self.labels:.2f} as many classes in a batch as in a uniform shuffle"
        )


def shuffle_quality(order: NDArray[np.int64], shards: NDArray[Any], labels: NDArray[Any], batch: int) -> ShuffleQuality:
    """The quality of an epoch's `order` (N,), N >= 2, in global batches of `batch`; `shards` and `labels` (N,) by id.

    A windowed order is low in `shards` by intent, and what that does to training shows in `labels`: close to 1 where
    the set was shuffled when it was written, far below where a shard holds few classes.
    """
    places = np.argsort(order)
    expected = (len(order) + 1) / 3  # between two random places
    distance = float(np.abs(np.diff(places)).mean()) / expected
    return ShuffleQuality(distance, _mix(shards[order], batch), _mix(labels[order], batch))


def _mix(groups: NDArray[Any], batch: int) -> float:
    """Different values in a batch of `groups` (N,), on average, over their expected number in a random batch."""
    steps = steps_per_epoch(len(groups), batch)
    rows = np.sort(groups[: steps * batch].reshape(steps, batch), axis=1)
    found = 1 + (np.diff(rows, axis=1) != 0).sum(axis=1).mean()
    sizes, many = np.unique(np.unique(groups, return_counts=True)[1], return_counts=True)
    drawn = np.arange(batch)
    absent = np.prod(np.maximum(len(groups) - sizes[:, None] - drawn, 0) / (len(groups) - drawn), axis=1)
    return float(found / (many * (1 - absent)).sum())


def steps_per_epoch(samples: int, batch: int) -> int:
    """Whole global batches in an epoch; ValueError where there is not even one."""
    if samples < batch:
        raise ValueError(f"{samples} samples do not fill one batch of {batch}; take a smaller batch or more samples")
    return samples // batch


def local_batch(batch: int, ranks: int) -> int:
    """How many samples of a global batch each rank takes; ValueError where it cannot be shared evenly."""
    if batch % ranks:
        raise ValueError(f"a global batch of {batch} cannot be shared evenly by {ranks} ranks; choose a multiple")
    return batch // ranks


def batch_ids(order: NDArray[np.int64], step: int, batch: int, rank: int = 0, ranks: int = 1) -> NDArray[np.int64]:
    """The ids (batch / ranks,) that `rank` takes from global batch `step` of an epoch's `order`: a run of its rows.

    The ranks' parts, one after another, are the global batch.
    """
    assert 0 <= rank < ranks and 0 <= step < steps_per_epoch(len(order), batch), (rank, ranks, step)
    rows = local_batch(batch, ranks)
    start = step * batch + rank * rows
    return order[start : start + rows]


def evaluation_batches(samples: int, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[NDArray[np.int64]]:
    """Ids 0 to samples - 1 in that order, which is the order of their bytes; the last batch may be short.

    Of every batch `rank` gets a run of rows. The ranks' parts, one after another, are the batch; they differ by one row
    at most, and of a short batch a rank may get none.
    """
    for start in range(0, samples, batch):
        rows = min(batch, samples - start)
        yield np.arange(start + rows * rank // ranks, start + rows * (rank + 1) // ranks)
