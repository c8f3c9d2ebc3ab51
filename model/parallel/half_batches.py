"""Joins the halves of a batch that the two ranks of a tower pair decoded.

Both towers need every image of their part of the batch. To decode none twice, each rank decodes half, and the halves
are swapped between the devices while the previous step is trained. GPUs swap uint8 crops, a quarter of the bytes of
float32 images, and the loader's function `finish` makes the images after the swap.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from model.batch import Batch
from model.parallel.ranks import AsyncHandle, Ranks
from model.shapes import TOWERS

Finish = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PairBatch:
    """The rows of both ranks of a pair, those of tower 0's rank first: the rows that a single rank would have."""

    images: Tensor
    labels: Tensor
    epoch: int
    step: int


class CropBatch(Batch, Protocol):
    """A batch whose images are still uint8 crops."""

    @property
    def rows(self) -> Tensor:
        """(N, ...) what `finish` needs of each sample."""
        ...


def swaps_crops(ranks: Ranks) -> bool:
    """Whether the loader of this rank is to give uint8 crops. On the CPU one operator makes images while it decodes."""
    return ranks.place.is_pair and ranks.device.type == "cuda"


def whole_batches(
    batches: Iterator[Batch], ranks: Ranks, uneven: bool = False, finish: Finish | None = None
) -> Generator[Batch]:
    """Yields the batches of a pair, from this rank's halves.

    The swap of a batch starts one batch early. So close the generator if you do not use it up, on both ranks after the
    same batch: `contextlib.closing`. Closing waits for the pending swap, whose partner waits for it, too.

    Args:
        batches: the rows that this rank decoded.
        ranks: this rank among the others. If it is in no pair, `batches` are yielded unchanged.
        uneven: whether the halves of a batch may differ by a row; the ranks then tell each other their number of rows.
        finish: for a pair only: makes the images of the crops and `rows` of a `CropBatch`. None if `batches` have
            images.
    """
    if not ranks.place.is_pair:
        assert finish is None
        yield from batches
        return
    pending = None
    try:
        while True:
            ranks.mark("waiting for the next batch")
            batch = next(batches, None)
            following = None if batch is None else _Halves(batch, ranks, uneven, finish)
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

    def __init__(self, batch: Batch, ranks: Ranks, uneven: bool, finish: Finish | None) -> None:
        own_rows = len(batch.labels)
        other_rows = ranks.swap_row_counts(own_rows) if uneven else own_rows
        own, other = (slice(0, own_rows), slice(own_rows, own_rows + other_rows))
        if ranks.place.towers == TOWERS[1:]:
            own, other = slice(other_rows, own_rows + other_rows), slice(0, other_rows)
        self._ranks, self._finish = ranks, finish
        self._handles: list[AsyncHandle] = []
        joined = []
        swapped = [batch.images, batch.labels]
        if finish is not None:
            swapped.append(cast(CropBatch, batch).rows)
        for half in swapped:
            both = half.new_empty(own_rows + other_rows, *half.shape[1:])
            both[own] = half
            self._handles.append(ranks.start_swap(both[own], both[other], "images"))
            joined.append(both)
        self._joined, self._epoch, self._step = joined, batch.epoch, batch.step

    def wait(self) -> PairBatch:
        """Waits for the other half; returns the whole batch."""
        self._ranks.mark("swapping halves of the images")
        with self._ranks.spans.span("swap"):
            while self._handles:
                self._handles.pop().wait()
        images, labels, *rows = self._joined
        if self._finish is not None:
            images = self._finish(images, *rows)
        return PairBatch(images, labels, self._epoch, self._step)
