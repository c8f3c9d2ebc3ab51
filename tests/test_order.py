"""The order of samples is a fresh permutation per epoch, shared out to ranks without loss."""

import numpy as np
import pytest

from pipeline.order import batch_ids, epoch_order, evaluation_batches, local_batch, steps_per_epoch


@pytest.mark.parametrize("samples", [1, 2, 7, 1000])
def test_an_epoch_is_a_permutation(samples):
    """Every sample once, whether the number is odd or even."""
    order = epoch_order(samples, 3, 5)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(samples))


def test_order_never_changes():
    """The order is the one it was when first written: old runs resume on the same data."""
    assert epoch_order(8, 0, 0).tolist() == [3, 5, 4, 2, 6, 7, 1, 0]
    assert np.array_equal(epoch_order(500, 2**63 + 1, 9), epoch_order(500, 2**63 + 1, 9))


def test_orders_are_uncorrelated():
    """An epoch's order correlates neither with the ids, nor with the next epoch's, nor with another seed's."""
    orders = [np.arange(10_000), *(epoch_order(10_000, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2))]
    correlations = np.corrcoef(orders)[np.triu_indices(len(orders), 1)]
    assert np.abs(correlations).max() < 0.04  # four standard deviations
    assert np.abs([np.corrcoef(o[:-1], o[1:])[0, 1] for o in orders[1:]]).max() < 0.04


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_global_batch(ranks):
    """The ranks' rows, one after another, are the global batch; an epoch's batches are its order less the tail."""
    order = epoch_order(103, 0, 0)
    assert steps_per_epoch(103, 8) == 12
    visited = [batch_ids(order, step, 8, rank, ranks) for step in range(12) for rank in range(ranks)]
    assert {len(ids) for ids in visited} == {8 // ranks}
    assert np.array_equal(np.concatenate(visited), order[:96])


def test_what_cannot_be_shared_is_refused():
    """A batch that the ranks cannot halve, and a set smaller than a batch, are the user's mistakes."""
    with pytest.raises(ValueError, match="batch of 6 cannot be shared evenly by 4 ranks"):
        local_batch(6, 4)
    with pytest.raises(ValueError, match="7 samples do not fill one batch of 8"):
        steps_per_epoch(7, 8)


@pytest.mark.parametrize("samples", [0, 1, 16, 17])
def test_evaluation_sees_all_once(samples):
    """Ids 0 to n - 1 in order, the last batch short."""
    batches = list(evaluation_batches(samples, 8))
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *batches]), np.arange(samples))
    assert all(len(ids) == 8 for ids in batches[:-1])
