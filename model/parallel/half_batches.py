"""Joins the halves of a batch that the two ranks of a tower pair decoded.

Both towers need every image of their part of the batch. To decode none twice, each rank decodes half, and the halves
are swapped between the devices while the previous step is trained.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from torch import Tensor

from model.batch import Batch
from model.parallel.ranks import AsyncHandle, Ranks
from model.shapes import TOWERS


@dataclass(frozen=True)
class PairBatch:
    """The rows of both ranks of a pair, those of tower 0's rank first: the rows that a single rank would have."""

    images: Tensor
    labels: Tensor
    epoch: int
    step: int


def whole_batches(batches: Iterator[Batch], ranks: Ranks, uneven: bool = False) -> Generator[Batch]:
    """Yields the batches of a pair, from this rank's halves.

    The swap of a batch starts one batch early. So close the generator if you do not use it up, on both ranks after the
    same batch: `contextlib.closing`. Closing waits for the pending swap, whose partner waits for it, too.

    Args:
        batches: the rows that this rank decoded.
        ranks: this rank among the others. If it is in no pair, `batches` are yielded unchanged.
        uneven: whether the halves of a batch may differ by a row; the ranks then tell each other their number of rows.
    """
    if not ranks.place.is_pair:
        yield from batches
        return
    pending = None
    try:
        while True:
            ranks.mark("waiting for the next batch")
            batch = next(batches, None)
            following = None if batch is None else _Halves(batch, ranks, uneven)
            current, pending = pending, following
            if current is not None:
                yield current.wait()
            if pending is None:
                return
    finally:
        if pending is not None:
            pending.wait()


class _Halves:
    """A batch whose halves are being swapped."""

    def __init__(self, batch: Batch, ranks: Ranks, uneven: bool) -> None:
        own_rows = len(batch.labels)
        other_rows = ranks.swap_row_counts(own_rows) if uneven else own_rows
        own, other = (slice(0, own_rows), slice(own_rows, own_rows + other_rows))
        if ranks.place.towers == TOWERS[1:]:
            own, other = slice(other_rows, own_rows + other_rows), slice(0, other_rows)
        self._ranks = ranks
        self._handles: list[AsyncHandle] = []
        joined = []
        for half in (batch.images, batch.labels):
            both = half.new_empty(own_rows + other_rows, *half.shape[1:])
            both[own] = half
            self._handles.append(ranks.start_swap(both[own], both[other], "images"))
            joined.append(both)
        self._batch = PairBatch(joined[0], joined[1], batch.epoch, batch.step)

    def wait(self) -> PairBatch:
        """Waits for the other half; returns the whole batch."""
        self._ranks.mark("swapping halves of the images")
        with self._ranks.spans.span("swap"):
            while self._handles:
                self._handles.pop().wait()
        return self._batch
