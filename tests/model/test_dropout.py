"""Dropout masks: rows of the global batch, fair, and different for every key."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.dropout import GOLDEN, DropoutDraws, empty_keys, keyed_masks, mixed, splitmix64
from model.recipe import LAYERS, SOURCE2012
from model.shapes import TOWERS

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


def test_keyed_masks_are_the_numbers_of_splitmix64():
    """For every unit, counted row by row of the global batch: the generator's next number is below the threshold."""
    first_row, rows, units = 3, 2, 5
    keys = [7, 2**64 - 3]
    for keep in (0.5, 0.25):
        found = keyed_masks(torch.tensor([7, -3]), first_row, rows, units, keep)
        for tower, key in enumerate(keys):
            for row in range(rows):
                for unit in range(units):
                    number = splitmix64((key + ((first_row + row) * units + unit) * GOLDEN) % 2**64)
                    signed = number - 2**64 if number >= 2**63 else number
                    assert found[row, tower, unit] == (signed < keep * 2**64 - 2**63)


def test_masks_from_a_key_in_memory_are_those_of_seed_and_step():
    """The same tensors of keys, filled again for each step, give the masks of this step; a rank's rows, and one tower
    alone, are parts of the whole. On the CPU, masks without keys stay those of torch's generator."""
    keys = empty_keys(SOURCE2012, CPU)
    assert list(keys) == ["fc6", "fc7"]
    for step in (0, 1, 2**40):
        draws = DropoutDraws(2012, step)
        draws.fill_keys(keys)
        for layer in keys:
            found = replace(draws, keys=keys).masks(layer, TOWERS, 8, 6, 0.5, CPU)
            key_of = {tower: mixed(2012, step, LAYERS.index(layer), tower) for tower in TOWERS}
            first = [splitmix64(key_of[tower]) >= 2**63 for tower in TOWERS]
            assert [
                bool(found[0, 0]),
                bool(found[0, 6]),
            ] == first
            rank = DropoutDraws(2012, step, first_row=5, global_batch=8, keys=keys)
            assert torch.equal(rank.masks(layer, TOWERS, 3, 6, 0.5, CPU), found[5:])
            for tower in TOWERS:
                alone = replace(draws, keys=keys).masks(layer, (tower,), 8, 6, 0.5, CPU)
                assert torch.equal(alone, found[:, 6 * tower :][:, :6])
            cpu = [draws.keep(layer, tower, 8, 6, 0.5, CPU) for tower in TOWERS]
            assert torch.equal(draws.masks(layer, TOWERS, 8, 6, 0.5, CPU), torch.cat(cpu, 1))


def test_keyed_masks_are_fair_and_all_different():
    """As for those of torch's generator: keys that differ in one number give masks that agree only by chance."""
    keys = [mixed(*key) for key in ((0, 0, 5, 0), (1, 0, 5, 0), (0, 1, 5, 0), (0, 0, 6, 0), (0, 0, 5, 1))]
    signed = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys])
    masks = keyed_masks(signed, 0, 200, 500, 0.5).float()
    for i in range(len(keys)):
        assert float(masks[:, i].mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(200 * 500))
        for j in range(i):
            same = (masks[:, i] == masks[:, j]).float().mean()
            assert float(same) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(200 * 500))
    for shift in (1, 500):  # neighbours in a row and in a column
        flat = masks[:, 0].flatten()
        same = (flat[shift:] == flat[:-shift]).float().mean()
        assert float(same) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(200 * 500))
