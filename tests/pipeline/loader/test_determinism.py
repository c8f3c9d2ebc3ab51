"""A batch depends only on shard set, settings, epoch and step: not on threads, queue, ranks or where a run resumed."""

from itertools import islice

import pytest
import torch

from pipeline.loader.loader import TrainLoader
from tests.support.loader_fixtures import STEPS, assert_parts_make_the_batch, digest, settings, take


@pytest.fixture(scope="module")
def uninterrupted(shards, basis):
    """The batches of a loader that ran through two epochs and a step."""
    return take(shards, basis, 2 * STEPS + 1, settings())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queue_depth", [1, 3])
def test_same_batches_for_any_threads_and_queue(shards, basis, uninterrupted, threads, queue_depth):
    """Threads and queue depth change nothing in a batch."""
    batches = take(shards, basis, 7, settings(threads=threads, queue_depth=queue_depth))
    assert [digest(batch) for batch in batches] == [digest(batch) for batch in uninterrupted]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("start_step", [0, 2])
def test_same_batches_for_any_ranks(shards, basis, uninterrupted, ranks, start_step):
    """The ranks' parts, concatenated, are the global batch, pixels included, resumed or not."""
    number = len(uninterrupted) - start_step
    parts = [
        take(shards, basis, number, settings(), start_step=start_step, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    for batch, *shares in zip(uninterrupted[start_step:], *parts, strict=True):
        assert_parts_make_the_batch(batch, shares)


@pytest.mark.parametrize("resume_at", range(1, 2 * STEPS + 1))
def test_resuming_at_any_step(shards, basis, uninterrupted, resume_at):
    """A loader that starts at any (epoch, step), with other threads and queue, continues like the uninterrupted one."""
    epoch, step = divmod(resume_at, STEPS)
    how = settings(threads=1, queue_depth=3)
    expected = [digest(batch) for batch in uninterrupted[resume_at:]]
    resumed = take(shards, basis, len(expected), how, start_epoch=epoch, start_step=step)
    assert [digest(batch) for batch in resumed] == expected
    if step == 0:  # the same place, given as the end of the previous epoch
        again = take(shards, basis, 1, how, start_epoch=epoch - 1, start_step=STEPS)
        assert digest(again[0]) == expected[0]


def test_batches_can_be_kept(shards, basis):
    """Later batches do not overwrite a batch, and closing the loader does not free it."""
    with TrainLoader(shards, basis, settings()) as loader:
        kept = list(islice(loader, 3))
        before = [digest(batch) for batch in kept]
        assert len(list(islice(loader, 20))) == 20
    assert [digest(batch) for batch in kept] == before


def test_another_seed_gives_another_order(shards, basis):
    """Two seeds visit the samples in different orders."""
    first, second = (take(shards, basis, 1, settings(seed=seed))[0] for seed in (0, 1))
    assert not torch.equal(first.ids, second.ids)
