"""The order of samples: which sample ids each step uses, the same on any number of ranks. NumPy only.

Sample ids are int64 row numbers of the shard set's index. Training visits a random permutation of them in global
batches, and drops the tail that does not fill a batch. Evaluation visits 0 to N - 1, every sample exactly once.

There are two kinds of permutation, both pure functions of (seed, epoch). `epoch_order` in `pipeline/philox.py` is
uniform over the whole set. `windowed_order` visits a few shards at a time, for sets that are larger than memory on
storage with slow random reads; `shuffle_quality` measures how well it mixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.philox import Purpose, random_keys

Order = Literal["global", "windowed"]
Ids = NDArray[np.int64]


def windowed_order(shards: NDArray[Any], seed: int, epoch: int, window_shards: int) -> Ids:
    """A permutation that visits the shards in random order, `window_shards` at a time, and shuffles within a window.

    Each shard belongs to exactly one window. If one window holds all shards, the result equals `epoch_order`.

    Args:
        shards: (N,) the shard of each sample, numbered from 0.
        seed: 0 to 2**64 - 1.
        epoch: counts from 0.
        window_shards: shards in a window; the last window may have fewer.

    Returns:
        (N,) the sample ids 0 to N - 1.
    """
    shard_keys = random_keys(int(shards.max()) + 1, seed, epoch, Purpose.SHARDS)
    shard_places = np.argsort(np.argsort(shard_keys, kind="stable"))
    sample_keys = random_keys(len(shards), seed, epoch, Purpose.ORDER)
    windows = shard_places // window_shards
    return _argsort_in_groups(windows.astype(np.min_scalar_type(windows.max()))[shards], sample_keys)


def _argsort_in_groups(groups: NDArray[np.unsignedinteger[Any]], keys: NDArray[np.uint64]) -> Ids:
    """The positions (n,) sorted by group, then by key: `np.lexsort((keys, groups))`, but four times as fast.

    NumPy sorts 8 and 16 bits in linear time, and the keys of one group at a time fit in the CPU cache.
    """
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups)).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        places = order[start:end]
        order[start:end] = places[np.argsort(keys[places], kind="stable")]
    return order


@dataclass(frozen=True)
class ShuffleQuality:
    """How an order compares with a uniform permutation, for which each ratio is 1 in expectation.

    Attributes:
        distance: mean distance, in the order, between two samples that are stored side by side.
        shards: mean number of different shards in a batch.
        labels: mean number of different classes in a batch.
    """

    distance: float
    shards: float
    labels: float

    def __str__(self) -> str:
        return (
            f"relative to a uniform shuffle, stored neighbours are {self.distance:.2f} times as far apart; "
            f"a batch has {self.shards:.2f} times as many shards and {self.labels:.2f} times as many classes"
        )


def shuffle_quality(order: Ids, shards: NDArray[Any], labels: NDArray[Any], batch: int) -> ShuffleQuality:
    """Measures how well an epoch's order mixes a set.

    A windowed order has a low `shards` ratio by design. Its effect on training shows in `labels`: the ratio is close to
    1 if the samples were shuffled when the set was written, and far below 1 if each shard holds few classes.

    Args:
        order: (N,) sample ids, N at least 2.
        shards: (N,) the shard of each sample, by id.
        labels: (N,) the class of each sample, by id.
        batch: samples in a global batch.
    """
    places = np.argsort(order)
    expected_distance = (len(order) + 1) / 3  # the mean distance between two random places
    distance_ratio = float(np.abs(np.diff(places)).mean()) / expected_distance
    return ShuffleQuality(distance_ratio, _distinct_ratio(shards[order], batch), _distinct_ratio(labels[order], batch))


def _distinct_ratio(groups: NDArray[Any], batch: int) -> float:
    """The mean number of distinct values in batches of `groups` (N,), divided by its expectation for random batches."""
    steps = steps_per_epoch(len(groups), batch)
    rows = np.sort(groups[: steps * batch].reshape(steps, batch), axis=1)
    found = 1 + (np.diff(rows, axis=1) != 0).sum(axis=1).mean()
    # A group of `size` samples is absent from a random batch with the hypergeometric probability of drawing none of
    # them. Groups of equal size share it, so it is computed once for each distinct size.
    sizes, groups_of_size = np.unique(np.unique(groups, return_counts=True)[1], return_counts=True)
    drawn = np.arange(batch)
    absent = np.prod(np.maximum(len(groups) - sizes[:, None] - drawn, 0) / (len(groups) - drawn), axis=1)
    return float(found / (groups_of_size * (1 - absent)).sum())


def steps_per_epoch(samples: int, batch: int) -> int:
    """The number of whole global batches in an epoch.

    Raises:
        ValueError: the samples do not fill one batch.
    """
    if samples < batch:
        raise ValueError(f"{samples} samples do not fill one batch of {batch}; use a smaller batch or more samples")
    return samples // batch


def local_batch(batch: int, ranks: int) -> int:
    """The number of samples that each rank takes from a global batch.

    Raises:
        ValueError: the ranks cannot share the batch evenly.
    """
    if batch % ranks:
        raise ValueError(
            f"a global batch of {batch} cannot be shared evenly by {ranks} ranks; choose a multiple of {ranks}"
        )
    return batch // ranks


def batch_ids(order: Ids, step: int, batch: int, rank: int = 0, ranks: int = 1) -> Ids:
    """The ids (batch / ranks,) that `rank` takes from global batch `step` of an epoch's `order`.

    Each rank takes consecutive rows. The rows of all ranks, concatenated in rank order, are the global batch.
    """
    assert 0 <= rank < ranks and 0 <= step < steps_per_epoch(len(order), batch), (rank, ranks, step)
    rows = local_batch(batch, ranks)
    start = step * batch + rank * rows
    return order[start : start + rows]


def evaluation_batches(samples: int, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[Ids]:
    """Yields the ids of every evaluation batch of `rank`: 0 to samples - 1 in order, which is the order of their bytes.

    The last global batch may be short. Each rank takes consecutive rows; concatenated in rank order they are the global
    batch. The ranks' shares differ by at most one row, and of a short batch a rank may get no row.
    """
    for start in range(0, samples, batch):
        rows = min(batch, samples - start)
        yield np.arange(start + rows * rank // ranks, start + rows * (rank + 1) // ranks)
