"""TODO-DOC model.evaluation (from model.trainer)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.alexnet import AlexNet
from model.batch import Batch
from model.parallel.exchange import TowerExchange
from model.trainer import NO_EXCHANGE, Interrupted, autocast


@dataclass(frozen=True)
class Scores:
    """Scores over a whole set: mean negative log-probability of the right class, and fractions of right guesses."""

    loss: float
    top1: float
    top5: float
    images: int


def never() -> bool:
    """For those whom nobody stops."""
    return False


@torch.no_grad()
def evaluate(
    model: AlexNet,
    batches: Iterable[Batch],
    precision: str = "float32",
    towers: TowerExchange = NO_EXCHANGE,
    stopped: Callable[[], bool] = never,
) -> Scores:
    """Scores of `model` on batches of views (N, views, 3, 224, 224), this rank's; the scores are over all ranks'.

    The probabilities of a picture's views are averaged, and all scores come from the average (P 4.1; layer.cu:1804).
    Raises Interrupted where `stopped`, asked after every batch, says so.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, hits of 1 and of 5, images
    for batch in batches:
        count, views = batch.images.shape[:2]
        if count:  # a pair's share of the last batch may be none
            with autocast(batch.images.device, precision):
                logits = model(batch.images.flatten(0, 1), exchange=towers)
            if 0 in model.towers:
                sums += torch.stack([*_scores(logits, batch.labels, views), logits.new_tensor(count).double()]).cpu()
        if stopped():
            raise Interrupted
    loss, top1, top5, images = towers.ranks.total(sums).tolist()
    return Scores(loss / images, top1 / images, top5 / images, round(images))


def _scores(logits: Tensor, labels: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = logits.double().softmax(dim=1).view(len(labels), views, -1).mean(dim=1)
    right = probabilities.gather(1, labels[:, None])
    return -right.log().sum(), hits(probabilities, right, 1).sum(), hits(probabilities, right, 5).sum()


def hits(probabilities: Tensor, right: Tensor, k: int) -> Tensor:
    """Share, (N,), of a hit among the first `k` guesses: 1 or 0, or between where the right class (probability `right`,
    (N, 1)) ties with others for the last places (layer_kernels.cu:96-118)."""
    better = (probabilities > right).sum(dim=1)
    equal = (probabilities == right).sum(dim=1)
    return ((k - better) / equal).clamp(0, 1).double()
