"""The small form of tests/soak/scale.py: 1,000 ranks share a set, and a rank resumes in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.loader.order import Order
from pipeline.philox import epoch_order
from tests.soak import scale

SAMPLES, RANKS = 70_001, 1000


def test_a_thousand_ranks_read_every_sample_exactly_once():
    """In training, which half as many ranks continue in the middle of the epoch, and in evaluation."""
    assert list(scale.faults_of_sharing(epoch_order(SAMPLES, 0, scale.EPOCH), RANKS)) == []


def test_a_sample_that_is_read_twice_is_found():
    order = epoch_order(SAMPLES, 0, 0)
    order[5] = order[6]
    assert [fault.split()[0] for fault in scale.faults_of_sharing(order, RANKS)] == ["training"]


@pytest.mark.parametrize("order", scale.ORDERS)
def test_a_rank_opens_the_set_and_resumes_in_the_middle(order: Order, tmp_path: Path):
    scale.write_synthetic_set(tmp_path, SAMPLES, classes=50)
    rank = scale.start_of_a_rank(tmp_path, order, 100)
    assert rank["first_sample"] == rank["expected_sample"]
    assert rank["peak_bytes"] >= rank["before_bytes"] > 0


def test_samples_of_the_synthetic_set_do_not_overlap(tmp_path: Path):
    scale.write_synthetic_set(tmp_path, 3000, classes=50)
    index = np.load(tmp_path / "index.npy")
    same = index["shard"][1:] == index["shard"][:-1]
    assert (index["offset"][1:] >= index["offset"][:-1] + index["size"][:-1])[same].all()
