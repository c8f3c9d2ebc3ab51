"""Dropout masks: rows of the global batch, fair, and different for every key."""

from __future__ import annotations

import math

import pytest
import torch

from model.dropout import DropoutDraws, splitmix64

CPU = torch.device("cpu")


def test_a_rank_s_masks_are_rows_of_the_whole_batch() -> None:
    """A rank's mask equals its rows of the global batch's mask; rows past the batch raise an error."""
    whole = DropoutDraws(seed=1, step=2).keep("fc6", 0, 40, 33, 0.5, CPU)
    for first, rows in ((0, 10), (10, 30), (39, 1)):
        part = DropoutDraws(1, 2, first_row=first, global_batch=40).keep("fc6", 0, rows, 33, 0.5, CPU)
        assert torch.equal(part, whole[first : first + rows])
    with pytest.raises(ValueError, match=r"rows 30..41 of a batch of 40"):
        DropoutDraws(1, 2, first_row=30, global_batch=40).keep("fc6", 0, 11, 33, 0.5, CPU)


def test_masks_are_fair_and_all_different() -> None:
    """Half of all units are kept; another seed, step, layer or tower gives a mask that agrees only by chance."""
    keys = [(0, 0, "fc6", 0), (1, 0, "fc6", 0), (0, 1, "fc6", 0), (0, 0, "fc7", 0), (0, 0, "fc6", 1), (1, 1, "fc7", 1)]
    masks = [DropoutDraws(seed, step).keep(layer, t, 200, 500, 0.5, CPU) for seed, step, layer, t in keys]
    chance = pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(200 * 500))
    for i, mask in enumerate(masks):
        assert float(mask.float().mean()) == chance
        assert all(float((mask == other).float().mean()) == chance for other in masks[:i])
    again = DropoutDraws(0, 0).keep("fc6", 0, 200, 500, 0.5, CPU)
    assert torch.equal(again, masks[0])


def test_splitmix64_is_the_published_generator() -> None:
    """It gives the first outputs of the reference implementation for the states 0 and 1234567."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
