"""The order of samples is a new permutation in each epoch, and the ranks share it without loss."""

import numpy as np
import pytest

from pipeline.loader.order import (
    batch_ids,
    evaluation_batches,
    local_batch,
    shuffle_quality,
    steps_per_epoch,
    windowed_order,
)
from pipeline.philox import Purpose, epoch_order, random_keys

SHARDS = np.repeat(
    np.arange(13), [40] * 12 + [7]
)  # the shard of each sample; the last shard is smaller, as in a shard set


@pytest.mark.parametrize("samples", [1, 2, 7, 1000])
def test_an_epoch_is_a_permutation(samples):
    """Every sample occurs once, for an odd or even number of samples."""
    order = epoch_order(samples, 3, 5)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(samples))


def test_order_never_changes():
    """The order is the same in every version of the code, so that old runs resume on the same data."""
    assert epoch_order(8, 0, 0).tolist() == [3, 5, 4, 2, 6, 7, 1, 0]
    assert np.array_equal(epoch_order(500, 2**63 + 1, 9), epoch_order(500, 2**63 + 1, 9))


def test_orders_are_uncorrelated():
    """An epoch's order is correlated neither with the ids, nor with another epoch's order, nor with another seed's."""
    orders = [np.arange(10_000), *(epoch_order(10_000, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2))]
    correlations = np.corrcoef(orders)[np.triu_indices(len(orders), 1)]
    assert np.abs(correlations).max() < 0.04  # four standard deviations
    assert np.abs([np.corrcoef(o[:-1], o[1:])[0, 1] for o in orders[1:]]).max() < 0.04


@pytest.mark.parametrize("window_shards", [1, 3, 13, 100])
def test_a_windowed_order_is_the_order_of_one_sort_by_window_and_key(window_shards):
    """For shards of any order in the index."""
    shards = np.random.default_rng(1).permutation(SHARDS)
    places = np.argsort(np.argsort(random_keys(13, 5, 2, Purpose.SHARDS)))
    keys = random_keys(len(shards), 5, 2, Purpose.ORDER)
    expected = np.lexsort((keys, places[shards] // window_shards))
    assert np.array_equal(windowed_order(shards, 5, 2, window_shards), expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_global_batch(ranks):
    """The ranks' rows, concatenated, are the global batch; the batches of an epoch are its order without the tail."""
    order = epoch_order(103, 0, 0)
    assert steps_per_epoch(103, 8) == 12
    visited = [batch_ids(order, step, 8, rank, ranks) for step in range(12) for rank in range(ranks)]
    assert {len(ids) for ids in visited} == {8 // ranks}
    assert np.array_equal(np.concatenate(visited), order[:96])


def test_sizes_that_do_not_fit_are_rejected():
    """A batch that the ranks cannot share evenly, and a set smaller than a batch, are errors."""
    with pytest.raises(ValueError, match="batch of 6 cannot be shared evenly by 4 ranks"):
        local_batch(6, 4)
    with pytest.raises(ValueError, match="7 samples do not fill one batch of 8"):
        steps_per_epoch(7, 8)


@pytest.mark.parametrize("samples", [0, 1, 16, 17])
def test_evaluation_sees_all_once(samples):
    """Evaluation visits ids 0 to N - 1 in order, and only the last batch is short."""
    batches = list(evaluation_batches(samples, 8))
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *batches]), np.arange(samples))
    assert all(len(ids) == 8 for ids in batches[:-1])


@pytest.mark.parametrize("window", [1, 4, 13, 100])
def test_a_windowed_epoch_is_a_permutation_window_by_window(window):
    """Every sample occurs once, each shard is in one window, and no window has more than `window` shards."""
    order = windowed_order(SHARDS, 3, 5, window)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(len(SHARDS)))
    start, visited = 0, SHARDS[order]
    while start < len(order):
        shards = list(dict.fromkeys(visited[start:]))[:window]
        end = start + np.isin(SHARDS, shards).sum()
        assert set(visited[start:end]) == set(shards)
        start = end


def test_one_window_is_the_global_order():
    """If one window holds all shards, the order is the global one."""
    assert np.array_equal(windowed_order(SHARDS, 3, 5, 13), epoch_order(len(SHARDS), 3, 5))


def test_windowed_order_never_changes():
    """The order is the same in every version; another epoch or seed changes the order of shards and within them."""
    assert windowed_order(np.arange(8) // 2, 0, 0, 2).tolist() == [5, 4, 6, 7, 3, 2, 1, 0]
    first, *others = (windowed_order(SHARDS, seed, epoch, 2) for seed, epoch in ((0, 0), (0, 1), (1, 0)))
    for other in others:
        assert list(dict.fromkeys(SHARDS[first])) != list(dict.fromkeys(SHARDS[other]))
        assert not np.array_equal(np.argsort(first[SHARDS[first] == 0]), np.argsort(other[SHARDS[other] == 0]))


def test_quality_of_a_uniform_order_is_one():
    """The mean over epochs of each ratio is 1, for shards and classes of unequal size."""
    shards, labels = np.repeat(SHARDS, 4), np.arange(4 * len(SHARDS)) % 150
    of_epochs = [shuffle_quality(epoch_order(len(shards), 0, epoch), shards, labels, 64) for epoch in range(50)]
    for name in ("distance", "shards", "labels"):
        assert np.mean([getattr(quality, name) for quality in of_epochs]) == pytest.approx(1, abs=0.01)


def test_quality_of_known_orders():
    """In stored order neighbours are 1 apart and a batch has one shard; an order of four samples is worked by hand."""
    quality = shuffle_quality(np.arange(400), np.arange(400) // 40, np.arange(400) % 10, 40)
    assert quality.distance == pytest.approx(3 / 401)
    assert quality.shards == pytest.approx(0.1, rel=0.02) and quality.labels == pytest.approx(1, rel=0.02)
    halves = np.array([0, 0, 1, 1])  # two of four samples have one group in 1/3 of the draws: 5/3 groups on average
    by_hand = shuffle_quality(np.array([0, 2, 1, 3]), halves, np.array([0, 1, 0, 1]), 2)
    assert by_hand.distance == pytest.approx((2 + 1 + 2) / 3 / (5 / 3))
    assert by_hand.shards == pytest.approx(2 / (5 / 3)) and by_hand.labels == pytest.approx(1 / (5 / 3))


def test_quality_of_windowed_orders():
    """Narrow windows have few shards in a batch. That lowers the number of classes in a batch only if the set is stored
    class by class, not if it was shuffled when it was written."""
    shards, mixed, sorted_ = np.arange(6400) // 100, epoch_order(6400, 9, 9) % 64, np.arange(6400) // 100
    narrow, wide = (windowed_order(shards, 0, 0, window) for window in (4, 32))
    few, more = (shuffle_quality(order, shards, mixed, 128) for order in (narrow, wide))
    assert few.shards < 0.1 < more.shards < 0.7 and few.distance < more.distance < 1
    assert few.labels == pytest.approx(1, abs=0.02)
    assert shuffle_quality(narrow, shards, sorted_, 128).labels < 0.1
