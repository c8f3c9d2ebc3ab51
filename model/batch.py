"""The interface of a batch. The data loader's batches have it, without importing this module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Batch(Protocol):
    """What training needs of a batch.

    A batch holds the rows that this rank decoded. On a tower pair `model.parallel.half_batches` joins the rows of both
    ranks.
    """

    @property
    def images(self) -> Tensor:
        """Training: (N, 3, 224, 224); evaluation: (N, views, 3, 224, 224). Pixel values 0-255, mean-subtracted."""
        ...

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch that the batch belongs to, from 0."""
        ...

    @property
    def step(self) -> int:
        """The position of the batch in its epoch, from 0."""
        ...
