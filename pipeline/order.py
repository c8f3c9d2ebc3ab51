"""Which samples at which step: pure functions of (seed, epoch), the same on any number of ranks. NumPy only.

Sample ids are int64 row numbers of the shard set's index. Training visits a random permutation of them in global
batches and drops the tail that does not fill one; evaluation visits 0 to n - 1, every sample exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.philox import Purpose, words_for


def epoch_order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation (samples,) of 0 to samples - 1 that `epoch` visits: sample ids sorted by random 64-bit keys."""
    words = words_for(np.arange((samples + 1) // 2), epoch, Purpose.ORDER, seed)  # four words are two keys
    keys = words.astype("<u4").view("<u8").reshape(-1)[:samples]
    return np.argsort(keys, kind="stable")


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
