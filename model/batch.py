"""A batch as the network's side sees it: whoever makes one needs to know nothing of it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Batch(Protocol):
    """What loop and exchange need of a batch; a rank's own rows, until the halves of a pair are swapped."""

    @property
    def images(self) -> Tensor:
        """(N, 3, 224, 224); for evaluation (N, views, 3, 224, 224)."""
        ...

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch that the batch belongs to."""
        ...

    @property
    def step(self) -> int:
        """Its place in the epoch."""
        ...
