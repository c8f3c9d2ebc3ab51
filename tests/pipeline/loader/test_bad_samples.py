"""Training skips a damaged image: only its row changes, and the substitute depends on nothing but set and epoch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loader import inputs
from pipeline.loader.bad_samples import broken_images, damaged, substitute_for
from pipeline.loader.inputs import TrainPlanner
from pipeline.loader.loader import TrainLoader, stage_loader, view_loader
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.reader import ShardSet
from tests.support.shard_fixtures import basis_of, sample, write_set

SAMPLES, STEPS = 27, 3
ALWAYS = {3: "cut", 20: "garbage", 21: "empty"}
SOMETIMES = {10: "late", 14: "unended", 17: "late"}  # if the crop reaches far enough down
BAD = ALWAYS | SOMETIMES


def broken(number: int, how: str) -> bytes:
    """The bytes of sample `number`, damaged in the way `how`."""
    whole = sample(number).jpeg
    cut = {"cut": whole[: len(whole) // 2], "late": whole[: len(whole) * 93 // 100], "unended": whole[:-2]}
    return {**cut, "garbage": b"no image" * 50, "empty": b"\0"}[how]


@pytest.fixture(autouse=True, scope="module")
def ends_unchecked():
    """The header check ignores a missing end, so that DALI meets images whose header is intact and fails on some crops.

    Otherwise no damage that the CPU decoder rejects would get past the check; another decoder may reject more.
    """

    def without_ends(*args):
        return {i: place for i, place in broken_images(*args).items() if "end of the image" not in place}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "broken_images", without_ends)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("whole"), [sample(n) for n in range(SAMPLES)])


@pytest.fixture(scope="module")
def damaged_set(tmp_path_factory):
    """The same set with six damaged images."""
    samples = [sample(n, broken(n, BAD[n]) if n in BAD else None) for n in range(SAMPLES)]
    return write_set(tmp_path_factory.mktemp("damaged"), samples)


@pytest.fixture(scope="module")
def basis(whole):
    return basis_of(whole)


def skipping(**changes):
    return LoaderSettings(**{"batch": 8, "threads": 2, "on_bad_sample": "skip", **changes})


def take(shards, basis, number, how, **start):
    with TrainLoader(shards, basis, how, **start) as loader:
        return list(islice(loader, number)), loader.bad_samples


@pytest.fixture(scope="module")
def skipped(damaged_set, basis):
    """Two epochs and a step of the damaged set."""
    return take(damaged_set, basis, 2 * STEPS + 1, skipping())[0]


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert (one.epoch, one.step) == (other.epoch, other.step)
        for name in ("images", "labels", "ids"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_other_rows_equal_the_intact_set(whole, damaged_set, basis, skipped):
    """Only the rows of damaged images differ; they hold intact samples with their own labels."""
    expected, _ = take(whole, basis, len(skipped), skipping())
    replaced = []
    for batch, original in zip(skipped, expected, strict=True):
        other = (batch.ids != original.ids).numpy()
        replaced += original.ids[other].tolist()
        for name in ("images", "labels", "ids"):
            assert torch.equal(getattr(batch, name)[~other], getattr(original, name)[~other])
        order = inputs.order_of(whole, skipping(), batch.epoch)
        assert batch.ids[other].tolist() == [
            substitute_for(damaged_set, i, order) for i in original.ids[other].tolist()
        ]
        assert not np.isin(batch.ids.numpy(), list(ALWAYS)).any()
        assert not np.isin(batch.ids.numpy()[other], list(BAD)).any()
        assert np.array_equal(batch.labels, whole.index["label"][batch.ids])
    assert set(ALWAYS) <= set(replaced) <= set(BAD) and set(replaced) & set(SOMETIMES)
    shown = {int(i) for batch in skipped for i in batch.ids}
    assert shown & set(SOMETIMES)  # some crops of these images do decode


def test_a_substitute_has_its_own_draws(damaged_set, whole, basis, skipped):
    """A substitute has the same pixels as in its regular place in the epoch."""
    order = [inputs.order_of(whole, skipping(), epoch) for epoch in range(3)]
    for batch in skipped:
        for row in np.flatnonzero(batch.ids.numpy() != order[batch.epoch][batch.step * 8 :][:8]):
            there = np.flatnonzero(order[batch.epoch] == int(batch.ids[row]))[0]
            if batch.epoch < 2 and there < 8 * STEPS:
                again = skipped[batch.epoch * STEPS + there // 8]
                assert torch.equal(again.images[there % 8], batch.images[row])


@pytest.mark.parametrize("how", [{"threads": 1}, {"queue_depth": 1}, {"queue_depth": 4}], ids=str)
def test_the_same_on_any_threads_and_queue(damaged_set, basis, skipped, how):
    assert_same(take(damaged_set, basis, len(skipped), skipping(**how))[0], skipped)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_on_any_ranks(damaged_set, basis, skipped, ranks):
    """The ranks' parts, concatenated, are the global batch; each rank reports the samples that it skipped."""
    parts = [take(damaged_set, basis, len(skipped), skipping(), rank=rank, ranks=ranks) for rank in range(ranks)]
    for batch, *shares in zip(skipped, *(batches for batches, _ in parts), strict=True):
        for name in ("images", "labels", "ids"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(share, name) for share in shares]))
    assert {place for _, bad in parts for place in bad} == set(take(damaged_set, basis, len(skipped), skipping())[1])


@pytest.mark.parametrize("resume_at", range(1, 2 * STEPS))
def test_the_same_after_resuming(damaged_set, basis, skipped, resume_at):
    """Resuming at any step of two epochs gives the same batches: samples skipped earlier do not matter."""
    epoch, step = divmod(resume_at, STEPS)
    batches, _ = take(damaged_set, basis, len(skipped) - resume_at, skipping(), start_epoch=epoch, start_step=step)
    assert_same(batches, skipped[resume_at:])


def test_skipped_samples_are_named(damaged_set, basis):
    """Each skipped image is named once, by tar, offset and key, however often it was skipped."""
    _, bad = take(damaged_set, basis, 4 * STEPS, skipping())
    assert len(set(bad)) == len(bad) and set(bad) <= set(damaged(damaged_set, np.arange(SAMPLES)).values())
    for number in ALWAYS:
        row = damaged_set.index[number]
        where = f"train-{row['shard']:06d}.tar:{row['offset']}:drawn_{number:04d} ("
        assert sum(place.startswith(where) for place in bad) == 1


def test_an_intact_set_has_nothing_to_skip(whole, basis):
    """on_bad_sample="skip" changes no batch of an intact set."""
    batches, bad = take(whole, basis, 4, skipping())
    assert bad == ()
    assert_same(batches, take(whole, basis, 4, skipping(on_bad_sample="stop"))[0])


def test_too_many_bad_samples_stop_the_loader(damaged_set, basis):
    """Up to `max_bad_samples` samples are skipped; one more is an error that names some, and the loader is closed."""
    met = len(take(damaged_set, basis, 4 * STEPS, skipping())[1])
    assert len(take(damaged_set, basis, 4 * STEPS, skipping(max_bad_samples=met))[1]) == met
    loader = TrainLoader(damaged_set, basis, skipping(max_bad_samples=met - 1))
    with pytest.raises(ValueError, match=rf"{met} images .* at most {met - 1} may be skipped: train-.* make_shards"):
        list(islice(loader, 4 * STEPS))
    with pytest.raises(ValueError, match="closed"):
        next(loader)


@pytest.mark.parametrize("stage", ["read", "decode", "full"])
def test_shortened_graphs_skip_too(damaged_set, basis, skipped, stage):
    """Graphs that end after a stage, for timing, skip the same samples; a graph that does not decode skips none."""
    ids = list(islice(stage_loader(damaged_set, basis, skipping(), stage), len(skipped)))
    if stage == "read":
        order = inputs.order_of(damaged_set, skipping(), 0)
        assert np.array_equal(np.concatenate(ids[:STEPS]), order[: 8 * STEPS])
    else:
        assert [batch.ids.tolist() for batch in skipped] == [those.tolist() for those in ids]


def test_evaluation_stops_or_leaves_out_damaged_images(damaged_set, basis):
    """By default one line names the image. With "skip" no substitute is scored: the rows are left out, and named."""
    with pytest.raises(ValueError, match=r"1 of 8 images .*drawn_0003"):
        list(view_loader(damaged_set, basis, replace(skipping(), on_bad_sample="stop")))
    batches = list(view_loader(damaged_set, basis, skipping()))
    ids = [i for batch in batches for i in batch.ids.tolist()]
    assert ids == [i for i in range(len(damaged_set)) if i not in BAD]
    assert all(len(batch.images) == len(batch.labels) == len(batch.ids) for batch in batches)
    assert sum(len(batch.left_out) for batch in batches) == len(BAD)
    assert "drawn_0003" in batches[0].left_out[0]


def test_an_error_without_a_damaged_image_is_raised(damaged_set, basis, monkeypatch):
    """DALI's own error is raised, with a note that names epoch and step."""
    monkeypatch.setattr(TrainPlanner, "without_undecodable", lambda planner, batch: None)
    loader = TrainLoader(damaged_set, basis, skipping())
    with pytest.raises(RuntimeError) as caught:
        list(islice(loader, 2 * STEPS))
    assert any("step 0; DALI decodes each image alone" in note for note in caught.value.__notes__)


def test_the_full_check_replaces_every_damaged_image(damaged_set, basis, monkeypatch):
    """With the header check as it is, no image without an end reaches DALI, whatever its crop."""
    monkeypatch.setattr(inputs, "broken_images", broken_images)
    batches, bad = take(damaged_set, basis, 4 * STEPS, skipping())
    assert not np.isin(np.concatenate([batch.ids for batch in batches]), list(BAD)).any()
    assert len(bad) == len(BAD)


def test_the_crc_finds_a_change_that_no_decoder_sees(whole, basis, tmp_path):
    """One bit of a scan: the image decodes, with other pixels. With `check_crc` the sample is named, or skipped."""
    folder = Path(shutil.copytree(whole.folder, tmp_path / "changed"))
    row = whole.index[3]
    with (folder / whole.manifest.shards[row["shard"]].name).open("r+b") as file:
        file.seek(row["offset"] + row["size"] // 2)
        value = file.read(1)[0] ^ 1
        file.seek(-1, 1)
        file.write(bytes([value]))
    changed = ShardSet(folder, whole.manifest, whole.index, whole.manifest_sha256)
    assert not take(changed, basis, 2 * STEPS, skipping())[1]
    batches, bad = take(changed, basis, 2 * STEPS, skipping(check_crc=True))
    assert not any(3 in batch.ids for batch in batches)
    assert len(bad) == 1 and "its CRC-32 is not the one in index.npy" in bad[0]
    assert not take(whole, basis, 2 * STEPS, skipping(check_crc=True))[1]


def test_a_substitute_is_intact_and_half_an_epoch_away(damaged_set):
    """It is the first intact sample from there, cyclically: damaged ones are passed over."""
    order = np.arange(SAMPLES)[::-1].copy()
    assert substitute_for(damaged_set, 8, order) == 22  # from place 18 to 31 - 27 = 4
    assert substitute_for(damaged_set, 7, order) == 19  # from place 19 to 5 and 6, which are 21 and 20, to 7
    assert substitute_for(damaged_set, 23, order) == 9  # from place 3 to 16, which is 10, to 17


def test_a_set_without_an_intact_image(tmp_path):
    """If every image is damaged, there is no substitute and the set is named."""
    lost = write_set(tmp_path, [sample(n, b"nothing" * 9) for n in range(3)])
    with pytest.raises(ValueError, match="no image of this shard set can be decoded"):
        substitute_for(lost, 1, np.arange(3))
