"""Ensembles and scores by class: means, fitted weights, and a confusion matrix that agrees with the scores."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from model.class_scores import ClassTally
from model.ensemble import equal_weights, fit_weights, weighted_mean
from model.evaluation import Tally, hits


def drawn(networks: int, images: int = 60, classes: int = 12) -> tuple[list[Tensor], Tensor]:
    """Probabilities of networks that are right more often than chance, and labels."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(classes, (images,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes)
    logits = [signal + torch.randn(images, classes, generator=generator) for _ in range(networks)]
    return [each.double().softmax(dim=1) for each in logits], labels


def top5(probabilities: list[Tensor], labels: Tensor, weights: list[float]) -> float:
    mean = weighted_mean(probabilities, weights)
    return hits(mean, mean.gather(1, labels[:, None]), 5).sum().item()


def test_a_network_twice_is_the_network_once():
    """Bit for bit, also with the weights from which the fit starts."""
    (one,), _ = drawn(1)
    assert torch.equal(weighted_mean([one, one], equal_weights(2)), one)
    assert torch.equal(weighted_mean([one, one], [0.5, 0.5]), one)


def test_weights_need_not_add_up_to_one():
    networks, _ = drawn(2)
    expected = (0.15 * networks[0] + 0.6 * networks[1]) / 0.75
    torch.testing.assert_close(weighted_mean(networks, [0.15, 0.6]), expected)
    torch.testing.assert_close(weighted_mean(networks, [0.0, 0.6]), networks[1])


def test_no_change_of_one_fitted_weight_is_better():
    """They are multiples of 0.05 from 0 to 1, and score better than equal weights."""
    networks, labels = drawn(3)
    networks[0] = networks[0].roll(3, dims=1)  # a bad network, so that equal weights are not the best
    weights = fit_weights(networks, labels)
    best = top5(networks, labels, weights)
    assert best > top5(networks, labels, [0.5] * 3) and weights[0] < 0.5
    assert all(round(weight / 0.05, 6).is_integer() and 0 <= weight <= 1 for weight in weights)
    for network, count in product(range(3), range(21)):
        changed = [count * 0.05 if network == other else weight for other, weight in enumerate(weights)]
        if sum(changed):
            assert top5(networks, labels, changed) <= best


def test_equal_networks_keep_the_weights_of_the_start():
    (one,), labels = drawn(1)
    assert fit_weights([one, one], labels) == [0.5, 0.5]


def test_scores_by_class_add_up_to_the_scores():
    """Two parts of the images give what all give; the diagonal of the confusion holds the top-1 hits, ties included."""
    (probabilities,), labels = drawn(1)
    probabilities[:20] = probabilities[:20].round(decimals=1)  # many ties
    tally, classes = Tally(), ClassTally(12)
    for part in (slice(0, 25), slice(25, 60)):
        tally.add(probabilities[part], labels[part])
        classes.add(probabilities[part], labels[part])
    scores, by_class = tally.scores(), classes.scores()
    assert by_class.images.tolist() == pytest.approx(labels.bincount(minlength=12).tolist())
    assert by_class.top1.sum().item() / 60 == pytest.approx(scores.top1)
    assert by_class.top5.sum().item() / 60 == pytest.approx(scores.top5)
    for label in range(12):
        own = probabilities[labels == label]
        right = own[:, label : label + 1]
        assert by_class.top1[label].item() == pytest.approx(hits(own, right, 1).sum().item())


def test_confused_pairs_are_sorted_and_leave_the_diagonal_out():
    tally = ClassTally(3)
    guesses = torch.eye(3).double()[torch.tensor([1, 1, 0, 2, 2, 2, 0])]
    tally.add(guesses, torch.tensor([0, 0, 0, 1, 2, 2, 2]))
    pairs = tally.scores().confused_pairs(10)
    assert [(p.label, p.taken_for, p.images) for p in pairs] == [(0, 1, 2), (1, 2, 1), (2, 0, 1)]
    assert pairs[0].share == pytest.approx(2 / 3)
    assert len(tally.scores().confused_pairs(1)) == 1
    assert [tally.scores().most_confused(label) for label in range(3)] == pairs
