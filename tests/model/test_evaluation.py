"""Evaluation: scores equal a plain twin, and ties count in shares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.evaluation import evaluate, hits
from model.parallel.ranks import SINGLE_RANK
from tests.support.rank_jobs import Rows, make


def test_scores_average_the_probabilities_of_the_views():
    """Twin: softmax of each view, mean over the views, and all scores from the mean."""
    model, _, _ = make(SINGLE_RANK)
    images, labels = torch.randn(6, 10, 3, 224, 224) * 60, torch.arange(6) % 5
    scores = evaluate(model, [Rows(images[:4], labels[:4], 0, 0), Rows(images[4:], labels[4:], 0, 1)])
    with torch.no_grad():
        probabilities = torch.stack([model.eval()(images[:, v]).double().softmax(1) for v in range(10)]).mean(0)
    assert scores.loss == pytest.approx(F.nll_loss(probabilities.log(), labels).item(), rel=1e-6)
    assert scores.top1 == pytest.approx((probabilities.argmax(1) == labels).double().mean().item())
    assert (scores.top5, scores.images) == (1.0, 6)  # five classes


def test_ties_score_in_shares():
    """A right class that shares 2 remaining places with 2 others is a hit of 2/3; without ties a hit is 1 or 0."""
    probabilities = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    right = probabilities[torch.arange(3), torch.tensor([1, 0, 0])][:, None]
    torch.testing.assert_close(hits(probabilities, right, 1), torch.tensor([0.0, 0.25, 1.0]).double())
    torch.testing.assert_close(hits(probabilities, right, 2), torch.tensor([1 / 3, 0.5, 1.0]).double())
    torch.testing.assert_close(hits(probabilities, right, 3), torch.tensor([2 / 3, 0.75, 1.0]).double())
