"""Scores of a network on a data set: loss, top-1 and top-5, over several views of each image.

`Tally` sums the scores of class probabilities, wherever these come from: one network here, several in `model.ensemble`.

Imports from `model.trainer`, which does not import this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.alexnet import AlexNet
from model.batch import Batch
from model.parallel.exchange import NO_EXCHANGE, TowerExchange
from model.parallel.ranks import SINGLE_RANK, Ranks
from model.trainer import Interrupted, autocast


@dataclass(frozen=True)
class Scores:
    """Scores over a whole data set.

    Attributes:
        loss: mean negative log-probability of the right class.
        top1: fraction of images whose most probable class is right.
        top5: fraction of images whose right class is among the five most probable.
        images: number of images.
    """

    loss: float
    top1: float
    top5: float
    images: int


def never() -> bool:
    """A `stopped` that never stops."""
    return False


class Tally:
    """Sums the scores of images whose class probabilities are given, on a rank that may see a part of the images.

    Args:
        device: device of the sums. On that of the probabilities, the host does not wait before `scores`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1 hits, top-5 hits, images

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds images: class probabilities (N, classes) float64, and labels (N,) int64."""
        right = probabilities.gather(1, labels[:, None])
        top1, top5 = hits(probabilities, right, 1).sum(), hits(probabilities, right, 5).sum()
        sums = torch.stack([-right.log().sum(), top1, top5, top1.new_tensor(len(labels))])
        self._sums += sums.to(self._sums.device)

    def scores(self, ranks: Ranks = SINGLE_RANK) -> Scores:
        """Scores over the images of all ranks; NaN if there are no images. Every rank must call it."""
        loss, top1, top5, images = ranks.total(self._sums.cpu()).tolist()
        if not images:
            return Scores(math.nan, math.nan, math.nan, 0)
        return Scores(loss / images, top1 / images, top5 / images, round(images))


@torch.no_grad()
def evaluate(
    model: AlexNet,
    batches: Iterable[Batch],
    precision: str = "float32",
    towers: TowerExchange = NO_EXCHANGE,
    stopped: Callable[[], bool] = never,
) -> Scores:
    """Scores a network. The class probabilities of an image's views are averaged, and all scores come from the average
    (paper section 4.1; layer.cu:1804 of the released source).

    Args:
        model: the network, or the towers of this rank.
        batches: this rank's rows; images are (N, views, 3, 224, 224).
        precision: one of `model.trainer.PRECISIONS`.
        towers: communication with the other ranks.
        stopped: asked after every batch; all ranks must get the same answer.

    Returns:
        Scores over the images of all ranks.

    Raises:
        Interrupted: if `stopped` returns True.
    """
    model.eval()
    tally = Tally(towers.ranks.device)
    for batch in batches:
        if len(batch.labels):  # a pair's share of the last batch may be empty
            probabilities = class_probabilities(model, batch.images, precision, towers)
            if probabilities is not None:
                tally.add(probabilities, batch.labels)
        if stopped():
            raise Interrupted
    return tally.scores(towers.ranks)


@torch.no_grad()
def class_probabilities(
    model: AlexNet, images: Tensor, precision: str = "float32", towers: TowerExchange = NO_EXCHANGE
) -> Tensor | None:
    """Class probabilities of images: the softmax of each view, averaged over the views.

    Args:
        model: the network in evaluation mode, or the towers of this rank.
        images: (N, views, 3, 224, 224), pixel values 0-255 with the mean subtracted.
        precision: one of `model.trainer.PRECISIONS`.
        towers: communication with the other ranks.

    Returns:
        (N, classes) float64; None on a rank without tower 0, which has no fc8.
    """
    count, views = images.shape[:2]
    with autocast(images.device, precision):
        logits = model(images.flatten(0, 1), exchange=towers)
    if 0 not in model.towers:
        return None
    probabilities: Tensor = logits.double().softmax(dim=1).view(count, views, -1).mean(dim=1)
    return probabilities


def hits(probabilities: Tensor, right: Tensor, k: int) -> Tensor:
    """Whether the right class is among the `k` most probable ones, per image.

    If the right class ties with others for the last places, the hit counts as the share of places that remain for the
    tied classes (layer_kernels.cu:96-118).

    Args:
        probabilities: (N, classes).
        right: (N, 1), the probability of the right class.
        k: number of guesses.

    Returns:
        (N,) float64: 1, 0, or a value between them for a tie.
    """
    better = (probabilities > right).sum(dim=1)
    equal = (probabilities == right).sum(dim=1)
    return ((k - better) / equal).clamp(0, 1).double()
