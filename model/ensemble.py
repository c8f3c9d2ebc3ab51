"""Ensembles: several networks classify the same images, and the (weighted) mean of their class probabilities counts.

The paper averages five and seven networks (section 6). The released source sums saved probabilities with a coefficient
for each network (avg-test.py), and can fit the coefficients to the top-5 score on validation images (avg-valid.py):
coordinate search in steps of 0.05, from 0.5 each. `fit_weights` says how the search is done here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.evaluation import hits
from model.parallel.ranks import SINGLE_RANK, Ranks

STEP = 0.05  # avg-valid.py
START_STEPS = 10  # 0.5 each: avg-valid.py
MOST_STEPS = 20  # a weight of 1


def equal_weights(networks: int) -> list[float]:
    """The weights of a plain mean: the same for every network, and their sum is 1."""
    return [1 / networks] * networks


def weighted_mean(probabilities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of the class probabilities of several networks.

    Args:
        probabilities: of each network, (N, classes).
        weights: one for each network, at least 0, with a sum above 0; they are divided by their sum.

    Returns:
        (N, classes) of the same type.
    """
    total = sum(weights)
    mean = torch.zeros_like(probabilities[0])
    for each, weight in zip(probabilities, weights, strict=True):
        mean += each * weight
    return mean / total


def fit_weights(probabilities: Sequence[Tensor], labels: Tensor, ranks: Ranks = SINGLE_RANK) -> list[float]:
    """Weights of an ensemble with the most top-5 hits on the given images, by coordinate search.

    Every weight starts at 0.5. One network after the other gets the multiple of 0.05 from 0 to 1 that gives the most
    hits while the other weights stay; it keeps its weight unless another one is better. The search ends after a round
    over all networks without a change. Every rank must call it with its own images, and all get the same weights.

    Args:
        probabilities: of each network, (N, classes).
        labels: (N,) int64.
        ranks: this rank among the others.

    Returns:
        A weight for each network: multiples of 0.05.
    """
    steps = [START_STEPS] * len(probabilities)
    best, changed = -1.0, True
    while changed:
        changed = False
        for network, own in enumerate(probabilities):
            rest = torch.zeros_like(own)
            for other, each in enumerate(probabilities):
                if other != network:
                    rest += each * (steps[other] * STEP)
            others = sum(steps) - steps[network]
            candidates = [count for count in range(MOST_STEPS + 1) if count or others]
            found = [_top5_hits(rest + own * (count * STEP), labels, ranks) for count in candidates]
            best = max(best, found[candidates.index(steps[network])])
            if max(found) > best:
                best, changed = max(found), True
                steps[network] = candidates[found.index(best)]
    return [round(count * STEP, 2) for count in steps]


def _top5_hits(probabilities: Tensor, labels: Tensor, ranks: Ranks) -> float:
    top5 = hits(probabilities, probabilities.gather(1, labels[:, None]), 5).sum()
    return float(ranks.total(top5.cpu()[None]).item())
