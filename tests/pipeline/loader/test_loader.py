"""The loader's images equal the NumPy reference's, and an epoch or an evaluation pass sees the samples that it must."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.loader import inputs
from pipeline.loader.augment import Lighting, mean_of, reference_views
from pipeline.loader.loader import TrainLoader, stage_loader, view_loader
from pipeline.shards.format import Sample
from tests.support.loader_fixtures import (
    MAX_PIXEL_DIFFERENCE,
    SAMPLES,
    assert_parts_make_the_batch,
    expected_images,
    settings,
    take,
)
from tests.support.shard_fixtures import decoded, jpeg_of, sample, write_set

LIGHTINGS = [Lighting("source2012"), Lighting("paper"), Lighting("none")]


@pytest.mark.parametrize("mean", ["image", "channel"])
@pytest.mark.parametrize("lighting", LIGHTINGS, ids=lambda lighting: lighting.convention)
def test_training_images_equal_the_reference(shards, basis, lighting, mean):
    """Crop, mirroring, mean, noise and division agree with NumPy on Pillow's pixels, for every shape of image."""
    how = settings(lighting=lighting, mean=mean)
    batches = take(shards, basis, 3, how)
    for batch in batches:
        difference = np.abs(batch.images.numpy() - expected_images(shards, basis, how, batch))
        assert difference.max() < MAX_PIXEL_DIFFERENCE
    seen = shards.index[np.concatenate([batch.ids for batch in batches])]
    assert (seen["width"] > seen["height"]).any() and (seen["width"] < seen["height"]).any()


@pytest.mark.parametrize("mean", ["image", "channel"])
@pytest.mark.parametrize("views", [1, 10])
def test_views_equal_the_reference(shards, basis, views, mean):
    """The views of every sample agree with NumPy on Pillow's pixels: nothing random, no noise."""
    for batch in view_loader(shards, basis, settings(mean=mean), views):
        images = [decoded(shards, sample_id) for sample_id in batch.ids.tolist()]
        expected = np.stack([reference_views(image, mean_of(basis, mean), views) for image in images])
        assert np.abs(batch.images.numpy() - expected).max() < MAX_PIXEL_DIFFERENCE


def test_view_loader_yields_every_sample_once(shards, basis):
    """Ids are in order with their labels, and the last batch is short."""
    batches = list(view_loader(shards, basis, settings()))
    assert [len(batch.ids) for batch in batches] == [8, 8, 8, 3]
    assert [tuple(batch.images.shape) for batch in batches] == [(n, 1, 3, 224, 224) for n in (8, 8, 8, 3)]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(SAMPLES))
    assert torch.cat([batch.labels for batch in batches]).tolist() == shards.index["label"].tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_evaluation_batches(shards, basis, ranks):
    """Every rank gets the same number of batches; their parts make the batch, even if one of them has no row."""
    whole = list(view_loader(shards, basis, settings()))
    parts = [list(view_loader(shards, basis, settings(), rank=rank, ranks=ranks)) for rank in range(ranks)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert_parts_make_the_batch(batch, shares)
    assert [len(share[-1].ids) for share in parts] == {2: [1, 2], 4: [0, 1, 1, 1]}[ranks]


def test_view_loader_with_fewer_batches_than_the_queue_holds(shards, basis):
    """A single short batch is a whole pass."""
    (batch,) = view_loader(shards, basis, settings(batch=40, queue_depth=3))
    assert len(batch.ids) == SAMPLES


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_an_epoch_sees_every_sample_at_most_once(shards, basis, order):
    """Each epoch has its own order, repeats no sample and omits only the tail; labels belong to ids."""
    how = settings(order=order, window_shards=2)
    batches = take(shards, basis, 9, how)
    assert [(batch.epoch, batch.step) for batch in batches] == [divmod(n, 3) for n in range(9)]
    epochs = [torch.cat([batch.ids for batch in batches[n : n + 3]]).numpy() for n in (0, 3, 6)]
    for epoch, ids in enumerate(epochs):
        assert len(np.unique(ids)) == 24
        assert np.array_equal(ids, inputs.order_of(shards, how, epoch)[:24])
        first_window = ids[:17]  # the two smallest shards hold 17 samples
        assert (set(shards.index["shard"][first_window]) < {0, 1, 2}) == (order == "windowed")
    assert not np.array_equal(epochs[0], epochs[1])
    for batch in batches:
        assert batch.images.dtype == torch.float32 and batch.images.is_contiguous()
        assert (batch.labels.dtype, batch.ids.dtype) == (torch.int64, torch.int64)
        assert np.array_equal(batch.labels, shards.index["label"][batch.ids])


def test_lighting_noise_ends_at_its_epoch(shards, basis):
    """From epoch `lighting_until` on there is neither noise nor division, and the crops are the same."""
    how = settings(lighting=Lighting("source2012"), lighting_until=1)
    for batch in take(shards, basis, 4, how):
        assert (how.lighting_at(batch.epoch).coefficient == 0) == (batch.epoch >= 1)
        assert np.abs(batch.images.numpy() - expected_images(shards, basis, how, batch)).max() < MAX_PIXEL_DIFFERENCE


@pytest.mark.parametrize("stage", ["read", "decode", "full"])
def test_shortened_graphs_process_the_same_samples(shards, basis, stage):
    """The graphs that end after a stage, for timing, process the samples of the whole graph in the same order."""
    stages = stage_loader(shards, basis, settings(), stage)
    expected = [batch.ids.tolist() for batch in take(shards, basis, 5, settings())]
    assert [ids.tolist() for ids in islice(stages, 5)] == expected
    stages.close()


@pytest.mark.parametrize("damage", ["cut", "unended", "garbage"])
def test_a_damaged_image_is_named(tmp_path, basis, damage):
    """An image that DALI cannot decode is named by tar, offset and key, with what to do; the loader is then closed."""
    whole = sample(3).jpeg
    jpeg = {"cut": whole[: len(whole) // 2], "unended": whole[:-2], "garbage": b"no image" * 50}[damage]
    damaged = write_set(tmp_path, [sample(n, jpeg if n == 3 else None) for n in range(16)])
    where = f"train-000000.tar:{damaged.index['offset'][3]}:drawn_0003"
    for loader in (TrainLoader(damaged, basis, settings()), view_loader(damaged, basis, settings())):
        with pytest.raises(ValueError, match=rf"1 of 8 images .*{where} .*make_shards"):
            list(islice(loader, 2))
    loader = TrainLoader(damaged, basis, settings())
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(islice(loader, 2))
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_real_photographs(tmp_path, basis):
    """The loader's images equal the reference's on photographs, too."""
    if "ALEXNET_PHOTOS" not in os.environ:
        pytest.skip("ALEXNET_PHOTOS names no folder of *.JPEG photographs")
    files = sorted(Path(os.environ["ALEXNET_PHOTOS"]).rglob("*.JPEG"))
    photos = []
    for number, file in enumerate(files):
        with Image.open(file) as original:
            scale = 256 / min(original.size)
            size = tuple(max(256, round(side * scale)) for side in original.size)
            jpeg = jpeg_of(original.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        photos.append(Sample(f"photo_{number}", 0, jpeg, *size))
    shards = write_set(tmp_path, photos, shard_samples=100)
    how = settings(batch=min(50, len(photos)))
    with TrainLoader(shards, basis, how) as loader:
        batches = islice(loader, loader.steps_per_epoch)
        largest = max(np.abs(b.images.numpy() - expected_images(shards, basis, how, b)).max() for b in batches)
    print(f"{len(photos)} photographs, largest difference {largest:.2e} pixel values (0-255)")
    assert largest < MAX_PIXEL_DIFFERENCE
