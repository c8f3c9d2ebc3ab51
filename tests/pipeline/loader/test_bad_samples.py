"""A damaged picture in training is skipped without a trace in the other rows, the same way however the feed is run."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.loader import inputs, runner
from pipeline.loader.bad_samples import damaged, substitute_for
from pipeline.loader.loader import TrainLoader, stage_loader, view_loader
from pipeline.loader.settings import LoaderSettings
from tests.support.shard_fixtures import basis_of, sample, write_set

SAMPLES, STEPS = 27, 3
ALWAYS = {3: "cut", 20: "garbage", 21: "empty"}
SOMETIMES = {10: "late", 14: "unended", 17: "late"}  # where the crop reaches far enough down
BAD = ALWAYS | SOMETIMES


def broken(number: int, how: str) -> bytes:
    """Bytes that are no whole JPEG."""
    whole = sample(number).jpeg
    cut = {"cut": whole[: len(whole) // 2], "late": whole[: len(whole) * 93 // 100], "unended": whole[:-2]}
    return {**cut, "garbage": b"no picture" * 50, "empty": b"\0"}[how]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("whole"), [sample(n) for n in range(SAMPLES)])


@pytest.fixture(scope="module")
def hurt(tmp_path_factory):
    """The same set with six pictures damaged."""
    samples = [sample(n, broken(n, BAD[n]) if n in BAD else None) for n in range(SAMPLES)]
    return write_set(tmp_path_factory.mktemp("hurt"), samples)


@pytest.fixture(scope="module")
def basis(whole):
    return basis_of(whole)


def skipping(**changes):
    return LoaderSettings(**{"batch": 8, "threads": 2, "on_bad_sample": "skip", **changes})


def take(shards, basis, number, how, **start):
    with TrainLoader(shards, basis, how, **start) as feed:
        return list(islice(feed, number)), feed.bad_samples


@pytest.fixture(scope="module")
def skipped(hurt, basis):
    """Two epochs and a step of the damaged set."""
    return take(hurt, basis, 2 * STEPS + 1, skipping())[0]


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert (one.epoch, one.step) == (other.epoch, other.step)
        for name in ("images", "labels", "ids"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_other_rows_are_the_undamaged_set_s(whole, hurt, basis, skipped):
    """Only rows of damaged pictures differ, and those show whole ones, with their own labels."""
    expected, _ = take(whole, basis, len(skipped), skipping())
    replaced = []
    for batch, original in zip(skipped, expected, strict=True):
        other = (batch.ids != original.ids).numpy()
        replaced += original.ids[other].tolist()
        for name in ("images", "labels", "ids"):
            assert torch.equal(getattr(batch, name)[~other], getattr(original, name)[~other])
        order = inputs.order_of(whole, skipping(), batch.epoch)
        assert batch.ids[other].tolist() == [substitute_for(hurt, i, order) for i in original.ids[other].tolist()]
        assert not np.isin(batch.ids.numpy(), list(ALWAYS)).any()
        assert not np.isin(batch.ids.numpy()[other], list(BAD)).any()
        assert np.array_equal(batch.labels, whole.index["label"][batch.ids])
    assert set(ALWAYS) <= set(replaced) <= set(BAD) and set(replaced) & set(SOMETIMES)
    shown = {int(i) for batch in skipped for i in batch.ids}
    assert shown & set(SOMETIMES)  # or the question would not be tested


def test_what_stands_in_is_drawn_as_its_own(hurt, whole, basis, skipped):
    """A row that stands in has the pixels which that sample has in that epoch wherever else it is seen."""
    order = [inputs.order_of(whole, skipping(), epoch) for epoch in range(3)]
    for batch in skipped:
        for row in np.flatnonzero(batch.ids.numpy() != order[batch.epoch][batch.step * 8 :][:8]):
            there = np.flatnonzero(order[batch.epoch] == int(batch.ids[row]))[0]
            if batch.epoch < 2 and there < 8 * STEPS:
                again = skipped[batch.epoch * STEPS + there // 8]
                assert torch.equal(again.images[there % 8], batch.images[row])


@pytest.mark.parametrize("how", [{"threads": 1}, {"queue_depth": 1}, {"queue_depth": 4}], ids=str)
def test_the_same_on_any_threads_and_queue(hurt, basis, skipped, how):
    assert_same(take(hurt, basis, len(skipped), skipping(**how))[0], skipped)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_on_any_ranks(hurt, basis, skipped, ranks):
    """The ranks' parts, one after another, are the global batch; each names what it met itself."""
    parts = [take(hurt, basis, len(skipped), skipping(), rank=rank, ranks=ranks) for rank in range(ranks)]
    for batch, *shares in zip(skipped, *(batches for batches, _ in parts), strict=True):
        for name in ("images", "labels", "ids"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(share, name) for share in shares]))
    assert {place for _, bad in parts for place in bad} == set(take(hurt, basis, len(skipped), skipping())[1])


@pytest.mark.parametrize("resume_at", range(1, 2 * STEPS))
def test_the_same_after_resuming(hurt, basis, skipped, resume_at):
    """At any step of two epochs: what was met before does not matter."""
    epoch, step = divmod(resume_at, STEPS)
    batches, _ = take(hurt, basis, len(skipped) - resume_at, skipping(), start_epoch=epoch, start_step=step)
    assert_same(batches, skipped[resume_at:])


def test_what_was_skipped_is_named(hurt, basis):
    """Each bad picture once, however often it was met, by tar, offset and key."""
    _, bad = take(hurt, basis, 4 * STEPS, skipping())
    assert len(set(bad)) == len(bad) and set(bad) <= set(damaged(hurt, np.arange(SAMPLES)).values())
    for number in ALWAYS:
        row = hurt.index[number]
        where = f"train-{row['shard']:06d}.tar:{row['offset']}:drawn_{number:04d} ("
        assert sum(place.startswith(where) for place in bad) == 1


def test_a_whole_set_has_nothing_to_skip(whole, basis):
    """Skipping changes no batch of a set that is whole."""
    batches, bad = take(whole, basis, 4, skipping())
    assert bad == ()
    assert_same(batches, take(whole, basis, 4, skipping(on_bad_sample="stop"))[0])


def test_there_is_a_limit(hurt, basis):
    """As many as the limit are skipped, one more stops the feed and is named; the feed is then closed."""
    met = len(take(hurt, basis, 4 * STEPS, skipping())[1])
    assert len(take(hurt, basis, 4 * STEPS, skipping(max_bad_samples=met))[1]) == met
    feed = TrainLoader(hurt, basis, skipping(max_bad_samples=met - 1))
    with pytest.raises(ValueError, match=rf"{met} pictures .* at most {met - 1} may be skipped: train-.* make_shards"):
        list(islice(feed, 4 * STEPS))
    with pytest.raises(ValueError, match="closed"):
        next(feed)


@pytest.mark.parametrize("stage", ["read", "decode", "full"])
def test_timing_skips_too(hurt, basis, skipped, stage):
    """Graphs cut short for timing go on over a damaged set; one that decodes nothing meets nothing."""
    ids = list(islice(stage_loader(hurt, basis, skipping(), stage), len(skipped)))
    if stage == "read":
        order = inputs.order_of(hurt, skipping(), 0)
        assert np.array_equal(np.concatenate(ids[:STEPS]), order[: 8 * STEPS])
    else:
        assert [batch.ids.tolist() for batch in skipped] == [those.tolist() for those in ids]


def test_evaluation_stops(hurt, basis):
    """Scores of other pictures would be wrong scores."""
    with pytest.raises(ValueError, match=r"1 of 8 pictures .*drawn_0003"):
        list(view_loader(hurt, basis, skipping()))


def test_an_error_that_no_picture_explains_is_not_swallowed(hurt, basis, monkeypatch):
    """DALI's own error goes through, with the place noted."""
    monkeypatch.setattr(runner, "damaged", lambda shards, ids: {})
    feed = TrainLoader(hurt, basis, skipping())
    with pytest.raises(RuntimeError) as caught:
        list(islice(feed, 2 * STEPS))
    assert any("whose pictures Pillow decodes" in note for note in caught.value.__notes__)


def test_a_stand_in_is_half_an_epoch_away_and_sound(hurt):
    """The first sound one from there on, round the end of the order, past others that are damaged."""
    order = np.arange(SAMPLES)[::-1].copy()
    assert substitute_for(hurt, 8, order) == 22  # from place 18 to 31 - 27 = 4
    assert substitute_for(hurt, 7, order) == 19  # from place 19 to 5 and 6, which are 21 and 20, to 7
    assert substitute_for(hurt, 23, order) == 9  # from place 3 to 16, which is 10, to 17


def test_a_set_without_a_sound_picture(tmp_path):
    """There is nothing to show instead."""
    lost = write_set(tmp_path, [sample(n, b"nothing" * 9) for n in range(3)])
    with pytest.raises(ValueError, match="no picture of this set can be decoded"):
        substitute_for(lost, 1, np.arange(3))
