"""Scores of a network on a data set: loss, top-1 and top-5, over several views of each image.

Imports from `model.trainer`, which does not import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.alexnet import AlexNet
from model.batch import Batch
from model.parallel.exchange import NO_EXCHANGE, TowerExchange
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
    sums = torch.zeros(4, dtype=torch.float64)  # loss, top-1 hits, top-5 hits, images
    for batch in batches:
        count, views = batch.images.shape[:2]
        if count:  # a pair's share of the last batch may be empty
            with autocast(batch.images.device, precision):
                logits = model(batch.images.flatten(0, 1), exchange=towers)
            if 0 in model.towers:
                sums += torch.stack([*_sums(logits, batch.labels, views), logits.new_tensor(count).double()]).cpu()
        if stopped():
            raise Interrupted
    loss, top1, top5, images = towers.ranks.total(sums).tolist()
    return Scores(loss / images, top1 / images, top5 / images, round(images))


def _sums(logits: Tensor, labels: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the images of a batch: loss, top-1 hits, top-5 hits."""
    probabilities = logits.double().softmax(dim=1).view(len(labels), views, -1).mean(dim=1)
    right = probabilities.gather(1, labels[:, None])
    return -right.log().sum(), hits(probabilities, right, 1).sum(), hits(probabilities, right, 5).sum()


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
