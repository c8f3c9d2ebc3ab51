"""Scores of every class, and which classes are taken for which: a confusion matrix whose ties count in shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.evaluation import hits
from model.parallel.ranks import SINGLE_RANK, Ranks


@dataclass(frozen=True)
class ConfusedPair:
    """One class that is taken for another.

    Attributes:
        label: the right class.
        taken_for: the class that had the highest probability.
        images: number of such images; an image whose highest probability several classes share counts in parts.
        share: the same as a fraction of the images of `label`.
    """

    label: int
    taken_for: int
    images: float
    share: float


@dataclass(frozen=True)
class ClassScores:
    """Scores by class, of all ranks.

    Attributes:
        confusion: (classes, classes) float64: images of the class of the row whose most probable class is that of the
            column. Ties count in shares, so the diagonal holds the top-1 hits.
        top5: (classes,) float64: top-5 hits.
    """

    confusion: Tensor
    top5: Tensor

    @property
    def images(self) -> Tensor:
        """(classes,) number of images."""
        return self.confusion.sum(dim=1)

    @property
    def top1(self) -> Tensor:
        """(classes,) top-1 hits."""
        return self.confusion.diagonal()

    def confused_pairs(self, most: int) -> list[ConfusedPair]:
        """At most `most` pairs of different classes with the most images, in falling order; equal ones by label."""
        errors = self.confusion - self.confusion.diagonal().diag()
        counts, order = errors.flatten().sort(descending=True, stable=True)
        found = []
        for count, place in zip(counts[:most].tolist(), order[:most].tolist(), strict=True):
            if count > 0:
                label, taken_for = divmod(place, len(errors))
                found.append(ConfusedPair(label, taken_for, count, count / float(self.images[label])))
        return found

    def most_confused(self, label: int) -> ConfusedPair | None:
        """The class that most images of `label` are wrongly taken for; None if no image is wrong."""
        errors = self.confusion[label].clone()
        errors[label] = 0
        count, taken_for = (value.item() for value in errors.max(dim=0))
        return ConfusedPair(label, int(taken_for), count, count / float(self.images[label])) if count else None


class ClassTally:
    """Sums what `ClassScores` needs, on a rank that may see a part of the images.

    Args:
        classes: number of classes.
        device: device of the probabilities.
    """

    def __init__(self, classes: int, device: torch.device | None = None) -> None:
        self._confusion = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        self._top5 = torch.zeros(classes, dtype=torch.float64, device=device)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds images: class probabilities (N, classes) float64, and labels (N,) int64."""
        highest = (probabilities == probabilities.max(dim=1, keepdim=True).values).double()
        self._confusion.index_add_(0, labels, highest / highest.sum(dim=1, keepdim=True))
        self._top5.index_add_(0, labels, hits(probabilities, probabilities.gather(1, labels[:, None]), 5))

    def scores(self, ranks: Ranks = SINGLE_RANK) -> ClassScores:
        """Scores over the images of all ranks. Every rank must call it."""
        return ClassScores(ranks.total(self._confusion.cpu()), ranks.total(self._top5.cpu()))
