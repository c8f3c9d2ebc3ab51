"""TODO-DOC model.parallel.half_batches (from model.exchange)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from torch import Tensor

from model.batch import Batch
from model.parallel.ranks import Ranks
from model.shapes import TOWERS


@dataclass(frozen=True)
class PairBatch:
    """The rows of both ranks of a pair, tower 0's first: what one rank alone would have had."""

    images: Tensor
    labels: Tensor
    epoch: int
    step: int


def whole_batches(batches: Iterator[Batch], ranks: Ranks, uneven: bool = False) -> Generator[Batch]:
    """The batches of a pair, of which each rank decoded half: halves are swapped between the devices, each while the
    step before is taken. `uneven` where the halves may differ by a row. Without a pair: `batches` themselves.

    Close it where it is not used up, on both ranks after the same step.
    """
    if not ranks.place.is_pair:
        yield from batches
        return
    ahead = None
    try:
        while True:
            ranks.mark("waiting for its batch")
            batch = next(batches, None)
            following = None if batch is None else _Halves(batch, ranks, uneven)
            ready, ahead = ahead, following
            if ready is not None:
                yield ready.land()
            if ahead is None:
                return
    finally:
        if ahead is not None:
            ahead.land()


class _Halves:
    """One batch while its halves are on their way."""

    def __init__(self, batch: Batch, ranks: Ranks, uneven: bool) -> None:
        mine = len(batch.labels)
        others = ranks.peer_rows(mine) if uneven else mine
        own, other = (slice(0, mine), slice(mine, mine + others))
        if ranks.place.towers == TOWERS[1:]:
            own, other = slice(others, mine + others), slice(0, others)
        self._ranks = ranks
        parts, self._flights = [], []
        for half in (batch.images, batch.labels):
            both = half.new_empty(mine + others, *half.shape[1:])
            both[own] = half
            self._flights.append(ranks.swap(both[own], both[other], "images"))
            parts.append(both)
        self._batch = PairBatch(parts[0], parts[1], batch.epoch, batch.step)

    def land(self) -> PairBatch:
        """The whole, once it is there."""
        self._ranks.mark("swapping halves of the images")
        with self._ranks.spans.span("swap"):
            while self._flights:
                self._flights.pop().wait()
        return self._batch
