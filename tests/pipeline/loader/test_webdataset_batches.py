"""The loader without DALI gives DALI's batches: order, draws, substitutes and, within rounding, pixels."""

from __future__ import annotations

import gc
import os
import pickle
import random
from itertools import islice

import numpy as np
import psutil
import pytest
import torch

from pipeline.loader import webdataset_batches
from pipeline.loader.augment import Lighting
from pipeline.loader.loader import TrainLoader, stage_loader, view_loader
from pipeline.loader.settings import LoaderSettings
from tests.support.loader_fixtures import (
    MAX_PIXEL_DIFFERENCE,
    SAMPLES,
    STEPS,
    assert_parts_make_the_batch,
    digest,
    settings,
    take,
)
from tests.support.shard_fixtures import sample, write_set


def without_dali(**changes) -> LoaderSettings:
    return settings(**{"library": "webdataset", **changes})


def assert_equal(batches, others):
    """The same batches, but for the rounding of two decoders."""
    for one, other in zip(batches, others, strict=True):
        assert (one.epoch, one.step, one.left_out) == (other.epoch, other.step, other.left_out)
        assert torch.equal(one.labels, other.labels) and torch.equal(one.ids, other.ids)
        assert (one.labels.dtype, one.ids.dtype) == (torch.int64, torch.int64)
        assert one.images.shape == other.images.shape and one.images.dtype == other.images.dtype
        assert one.images.is_contiguous()
        assert len(one.ids) == 0 or np.abs(one.images.numpy() - other.images.numpy()).max() < MAX_PIXEL_DIFFERENCE


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"order": "windowed", "window_shards": 2, "mean": "channel", "seed": 7},
        {"lighting": Lighting("paper"), "lighting_until": 1, "positions": 32},
    ],
    ids=["defaults", "windowed", "paper"],
)
def test_training_batches_are_those_of_dali(shards, basis, how):
    """Two epochs and a batch: images, labels, ids, epoch and step."""
    number = 2 * STEPS + 1
    assert_equal(take(shards, basis, number, without_dali(**how)), take(shards, basis, number, settings(**how)))


def test_batches_do_not_depend_on_workers_ranks_or_where_a_run_resumed(shards, basis):
    """Bit by bit, as with DALI."""
    uninterrupted = take(shards, basis, 2 * STEPS + 1, without_dali())
    one = take(shards, basis, len(uninterrupted), without_dali(threads=1, queue_depth=3))
    assert [digest(batch) for batch in one] == [digest(batch) for batch in uninterrupted]
    resumed = take(shards, basis, STEPS, without_dali(threads=3), start_epoch=1, start_step=1)
    assert [digest(batch) for batch in resumed] == [digest(batch) for batch in uninterrupted[STEPS + 1 :]]
    parts = [take(shards, basis, 2, without_dali(), start_step=2, rank=rank, ranks=2) for rank in range(2)]
    for batch, *shares in zip(uninterrupted[2:4], *parts, strict=True):
        assert_parts_make_the_batch(batch, shares)


@pytest.mark.parametrize(("views", "rank", "ranks"), [(10, 0, 1), (1, 0, 4), (1, 3, 4)])
def test_evaluation_views_are_those_of_dali(shards, basis, views, rank, ranks):
    """Every sample once; of the last batch, rank 0 of 4 gets no row."""
    with_dali = list(view_loader(shards, basis, settings(), views, rank, ranks))
    batches = list(view_loader(shards, basis, without_dali(threads=3), views, rank, ranks))
    assert_equal(batches, with_dali)
    assert ranks > 1 or torch.cat([batch.ids for batch in batches]).tolist() == list(range(SAMPLES))


def test_crops_can_be_finished_later(shards, basis):
    """`crops_only` gives uint8 crops, of which `finish` makes the same images."""
    (expected,) = take(shards, basis, 1, without_dali())
    with TrainLoader(shards, basis, without_dali(), crops_only=True) as loader:
        batch = next(loader)
        assert batch.images.dtype == torch.uint8 and batch.rows is not None and loader.finish is not None
        assert torch.equal(loader.finish(batch.images, batch.rows), expected.images)


def test_workers_leave_the_objects_of_this_process_alone(shards, basis, tmp_path, monkeypatch):
    """A fork that collected a DALI pipeline of this process would wait for its threads for ever."""
    freed, collect = tmp_path / "freed", gc.collect

    class Freed:
        """Says in which process it was freed."""

        def __init__(self):
            self.itself = self

        def __del__(self):
            with freed.open("a") as file:
                file.write(f"{os.getpid()}\n")

    class Collecting(webdataset_batches.Worker):
        """A worker that collects garbage."""

        def __call__(self, place):
            collect()
            return super().__call__(place)

    monkeypatch.setattr(webdataset_batches, "Worker", Collecting)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # so that there is garbage when the workers start
    Freed()
    take(shards, basis, 2, without_dali())
    collect()
    assert freed.read_text().split() == [str(os.getpid())]


@pytest.mark.parametrize("stage", ["read", "decode", "full"])
def test_a_loader_that_is_cut_short_takes_the_same_samples(shards, basis, stage):
    """The stages that the stall report times."""
    stages = stage_loader(shards, basis, without_dali(), stage, start_step=1)
    expected = take(shards, basis, 3, settings(), start_step=1)
    assert [ids.tolist() for ids in islice(stages, 3)] == [batch.ids.tolist() for batch in expected]
    stages.close()


@pytest.fixture(scope="module")
def damaged_set(tmp_path_factory):
    """Three damaged images."""
    whole = sample(3).jpeg
    damage = {3: whole[: len(whole) // 2], 20: b"no image" * 50, 14: sample(14).jpeg[:-2]}
    return write_set(tmp_path_factory.mktemp("damaged"), [sample(n, damage.get(n)) for n in range(SAMPLES)])


def test_damaged_images_are_skipped_as_with_dali(damaged_set, basis):
    """The same substitutes with their own draws, the same report, and evaluation without them."""
    found = {}
    for how in (settings(on_bad_sample="skip"), without_dali(on_bad_sample="skip")):
        with TrainLoader(damaged_set, basis, how) as loader:
            found[how.library] = list(islice(loader, 2 * STEPS)), loader.bad_samples
        found[how.library] += (list(view_loader(damaged_set, basis, how)),)
    (batches, bad, views), (others, other_bad, other_views) = found["webdataset"], found["dali"]
    assert_equal(batches, others)
    assert_equal(views, other_views)
    assert bad == other_bad and bad and sum(len(batch.left_out) for batch in views) == 3


def test_a_damaged_image_stops_the_loader_in_one_line(damaged_set, basis):
    """The message is the one with DALI, without the traceback of a worker process; the loader is then closed."""
    messages = []
    for how in (settings(), without_dali()):
        loader = TrainLoader(damaged_set, basis, how)
        with pytest.raises(ValueError, match="cannot be decoded") as caught:
            list(islice(loader, 2 * STEPS))
        messages.append(str(caught.value))
        with pytest.raises(ValueError, match="closed"):
            next(loader)
    assert messages[0] == messages[1]


def test_an_error_of_a_worker_is_one_line(shards, basis, tmp_path):
    """A tar that was cut while it was in use is named, without the traceback of a worker process."""
    lost = write_set(tmp_path, [sample(n) for n in range(16)])
    lost.tars[0].write_bytes(lost.tars[0].read_bytes()[:-1024])
    loader = TrainLoader(lost, basis, without_dali())
    with pytest.raises(ValueError, match=r"^\S*train-000000.tar: .*expected") as caught:
        list(islice(loader, STEPS))
    assert "\n" not in str(caught.value)


def test_closing_ends_the_workers_and_the_global_generators_are_left_alone(shards, basis):
    """Batches stay valid, and dropout or initial weights do not depend on the loader."""
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(1), random.random()
    torch.manual_seed(1)
    random.seed(1)
    others = psutil.Process().children()
    with TrainLoader(shards, basis, without_dali()) as loader:
        pickle.dumps(loader._batches.pipeline)  # macOS starts workers with a copy of it
        kept = next(loader)
        before, workers = digest(kept), [p for p in psutil.Process().children() if p not in others]
        assert len(workers) >= 2
        next(loader)
    assert (torch.rand(1), random.random()) == expected
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive and digest(kept) == before


def test_settings_that_do_not_fit():
    """An unknown library, and JPEG engines that webdataset does not use."""
    with pytest.raises(ValueError, match="library is 'ffcv'; choose dali or webdataset"):
        settings(library="ffcv")
    with pytest.raises(ValueError, match="webdataset decodes on the CPU"):
        without_dali(device="cuda", hw_decoder_load=0.5)
