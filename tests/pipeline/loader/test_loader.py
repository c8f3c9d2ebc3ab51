"""The feed's pictures are the NumPy reference's, and its batches are the same on any ranks, threads and resumption."""

import ctypes
import hashlib
import mmap
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.loader import inputs
from pipeline.loader.augment import Lighting, mean_of, reference_views
from pipeline.loader.loader import TrainLoader, stage_loader, view_loader
from pipeline.loader.reference import reference_batch
from pipeline.loader.settings import ANNOUNCED_AHEAD, LoaderSettings
from pipeline.profiling.throughput import measure_throughput
from pipeline.shards.format import Sample
from tests.support.shard_fixtures import basis_of, decoded, jpeg_of, sample, write_set

SAMPLES = 27  # three batches of 8 and a tail
GREY_LEVELS = 1e-3
LIGHTINGS = [Lighting("source2012"), Lighting("paper"), Lighting("none")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("shards"), [sample(number) for number in range(SAMPLES)])


@pytest.fixture(scope="module")
def basis(shards):
    return basis_of(shards)


def settings(**changes):
    return LoaderSettings(**{"batch": 8, "threads": 2, **changes})


def take(shards, basis, number, how, **start):
    with TrainLoader(shards, basis, how, **start) as feed:
        return list(islice(feed, number))


def expected_images(shards, basis, how, batch):
    """What the reference makes of the batch's samples."""
    return reference_batch(shards, basis, how, batch.epoch, batch.ids.numpy(force=True))[0]


def digest(batch):
    """Hash of everything in a batch."""
    parts = (batch.images, batch.labels, batch.ids)
    return hashlib.sha256(b"".join(part.numpy(force=True).tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("mean", ["image", "channel"])
@pytest.mark.parametrize("lighting", LIGHTINGS, ids=lambda lighting: lighting.convention)
def test_training_pixels_are_the_reference(shards, basis, lighting, mean):
    """Crop, mirroring, mean, lighting and division agree with NumPy on Pillow's pixels, in every shape of picture."""
    how = settings(lighting=lighting, mean=mean)
    batches = take(shards, basis, 3, how)
    for batch in batches:
        difference = np.abs(batch.images.numpy() - expected_images(shards, basis, how, batch))
        assert difference.max() < GREY_LEVELS
    seen = shards.index[np.concatenate([batch.ids for batch in batches])]
    assert (seen["width"] > seen["height"]).any() and (seen["width"] < seen["height"]).any()


@pytest.mark.parametrize("mean", ["image", "channel"])
@pytest.mark.parametrize("views", [1, 10])
def test_views_are_the_reference(shards, basis, views, mean):
    """The views of every sample agree with NumPy on Pillow's pixels; no lighting, no chance."""
    for batch in view_loader(shards, basis, settings(mean=mean), views):
        pictures = [decoded(shards, sample_id) for sample_id in batch.ids.tolist()]
        expected = np.stack([reference_views(picture, mean_of(basis, mean), views) for picture in pictures])
        assert np.abs(batch.images.numpy() - expected).max() < GREY_LEVELS


def test_view_feed_sees_every_sample_once(shards, basis):
    """Ids in order with their labels, the last batch short."""
    batches = list(view_loader(shards, basis, settings()))
    assert [len(batch.ids) for batch in batches] == [8, 8, 8, 3]
    assert [tuple(batch.images.shape) for batch in batches] == [(n, 1, 3, 224, 224) for n in (8, 8, 8, 3)]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(SAMPLES))
    assert torch.cat([batch.labels for batch in batches]).tolist() == shards.index["label"].tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_view_feed_is_shared_by_ranks(shards, basis, ranks):
    """Every rank gets as many batches; their parts, one after another, are the batch, even where one has no row."""
    whole = list(view_loader(shards, basis, settings()))
    parts = [list(view_loader(shards, basis, settings(), rank=rank, ranks=ranks)) for rank in range(ranks)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name in ("images", "labels", "ids"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(share, name) for share in shares]))
    assert [len(share[-1].ids) for share in parts] == {2: [1, 2], 4: [0, 1, 1, 1]}[ranks]


def test_view_feed_of_fewer_batches_than_the_queue_holds(shards, basis):
    """One batch, short at that, is a whole pass."""
    (batch,) = view_loader(shards, basis, settings(batch=40, queue_depth=3))
    assert len(batch.ids) == SAMPLES


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_an_epoch_sees_every_sample_at_most_once(shards, basis, order):
    """Each epoch: no sample twice, all but the tail, its own order; labels belong to ids; steps and epochs count up."""
    how = settings(order=order, window_shards=2)
    batches = take(shards, basis, 9, how)
    assert [(batch.epoch, batch.step) for batch in batches] == [divmod(n, 3) for n in range(9)]
    epochs = [torch.cat([batch.ids for batch in batches[n : n + 3]]).numpy() for n in (0, 3, 6)]
    for epoch, ids in enumerate(epochs):
        assert len(np.unique(ids)) == 24
        assert np.array_equal(ids, inputs.order_of(shards, how, epoch)[:24])
        assert (set(shards.index["shard"][ids[:17]]) < {0, 1, 2}) == (order == "windowed")  # 17: the least two shards
    assert not np.array_equal(epochs[0], epochs[1])
    for batch in batches:
        assert batch.images.dtype == torch.float32 and batch.images.is_contiguous()
        assert (batch.labels.dtype, batch.ids.dtype) == (torch.int64, torch.int64)
        assert np.array_equal(batch.labels, shards.index["label"][batch.ids])


@pytest.fixture(scope="module")
def through(shards, basis):
    """A feed that ran through two epochs and a step: its batches."""
    return take(shards, basis, 7, settings())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queue_depth", [1, 3])
def test_same_batches_for_any_threads_and_queue(shards, basis, through, threads, queue_depth):
    """Threads and queue depth change nothing in a batch."""
    batches = take(shards, basis, 7, settings(threads=threads, queue_depth=queue_depth))
    assert [digest(batch) for batch in batches] == [digest(batch) for batch in through]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("start", [0, 2])
def test_same_batches_for_any_ranks(shards, basis, through, ranks, start):
    """The ranks' parts, one after another, are the global batch, pixels and all, resumed or not."""
    place = {"start_epoch": 0, "start_step": start}
    parts = [take(shards, basis, 7 - start, settings(), rank=rank, ranks=ranks, **place) for rank in range(ranks)]
    for batch, *shares in zip(through[start:], *parts, strict=True):
        assert {(share.epoch, share.step) for share in shares} == {(batch.epoch, batch.step)}
        for name in ("images", "labels", "ids"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(share, name) for share in shares]))


@pytest.mark.parametrize("resume_at", range(1, 7))
def test_resuming_is_naming_the_step(shards, basis, through, resume_at):
    """A feed started at any (epoch, step), with other threads and another queue, goes on as the feed that ran through,
    across the edge of an epoch too."""
    epoch, step = divmod(resume_at, 3)
    how = settings(threads=1, queue_depth=3)
    expected = [digest(batch) for batch in through[resume_at:]]
    resumed = take(shards, basis, 7 - resume_at, how, start_epoch=epoch, start_step=step)
    assert [digest(batch) for batch in resumed] == expected
    if step == 0:  # the same place, named as the end of the epoch before
        again = take(shards, basis, 1, how, start_epoch=epoch - 1, start_step=3)
        assert digest(again[0]) == expected[0]


def test_batches_are_safe_to_keep(shards, basis):
    """A batch is not overwritten by later ones, nor lost when the feed is closed."""
    with TrainLoader(shards, basis, settings()) as feed:
        kept = list(islice(feed, 3))
        before = [digest(batch) for batch in kept]
        assert len(list(islice(feed, 20))) == 20
    assert [digest(batch) for batch in kept] == before


def test_another_seed_is_another_run(shards, basis):
    """Neither order nor pixels are shared between seeds."""
    first, second = (take(shards, basis, 1, settings(seed=seed))[0] for seed in (0, 1))
    assert not torch.equal(first.ids, second.ids)


def test_lighting_ends_at_its_epoch(shards, basis):
    """From `lighting_until` on neither noise nor division, on the same crops."""
    how = settings(lighting=Lighting("source2012"), lighting_until=1)
    for batch in take(shards, basis, 4, how):
        assert (how.lighting_at(batch.epoch).coefficient == 0) == (batch.epoch >= 1)
        assert np.abs(batch.images.numpy() - expected_images(shards, basis, how, batch)).max() < GREY_LEVELS


@pytest.mark.parametrize("stage", ["read", "decode", "full"])
def test_cut_graphs_see_the_same_order(shards, basis, stage):
    """Graphs cut short for timing handle the samples that the whole one handles."""
    stages = stage_loader(shards, basis, settings(), stage)
    expected = [batch.ids.tolist() for batch in take(shards, basis, 5, settings())]
    assert [ids.tolist() for ids in islice(stages, 5)] == expected
    stages.close()


@pytest.mark.parametrize("damage", ["cut", "unended", "garbage"])
def test_a_damaged_picture_is_named(tmp_path, basis, damage):
    """What DALI cannot decode is named by tar, offset and key, with what to do; the feed is then closed."""
    whole = sample(3).jpeg
    jpeg = {"cut": whole[: len(whole) // 2], "unended": whole[:-2], "garbage": b"no picture" * 50}[damage]
    damaged = write_set(tmp_path, [sample(n, jpeg if n == 3 else None) for n in range(16)])
    where = f"train-000000.tar:{damaged.index['offset'][3]}:drawn_0003"
    for feed in (TrainLoader(damaged, basis, settings()), view_loader(damaged, basis, settings())):
        with pytest.raises(ValueError, match=rf"1 of 8 pictures .*{where} .*make_shards"):
            list(islice(feed, 2))
    feed = TrainLoader(damaged, basis, settings())
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(islice(feed, 2))
    with pytest.raises(ValueError, match="closed"):
        next(feed)


def test_announced_bytes_are_read(tmp_path):
    """The kernel brings the announced parts of a mapped file into memory, and not the rest of the file."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * mmap.PAGESIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pages = np.frombuffer(mapped, np.uint8)
    resident = np.zeros(64, np.uint8)

    def in_memory() -> list[int]:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        address = ctypes.c_void_p(pages.ctypes.data)
        assert mincore(address, ctypes.c_size_t(len(pages)), ctypes.c_void_p(resident.ctypes.data)) == 0
        return np.flatnonzero(resident & 1).tolist()

    if in_memory():
        pytest.skip("this file system does not give up its cached pages")
    starts = np.array([mmap.PAGESIZE * 8 + 100, len(pages) - 5])
    inputs._announce(pages.ctypes.data + starts, np.array([mmap.PAGESIZE * 2, 5], np.int32))
    deadline = time.monotonic() + 10
    while len(in_memory()) < 4 and time.monotonic() < deadline:
        pass
    assert in_memory() == [8, 9, 10, 63]


def test_bytes_are_announced_ahead(shards, basis, monkeypatch):
    """When a batch has come out, the pictures of so many next ones are announced, with their sizes, by a thread."""
    announced = []
    monkeypatch.setattr(inputs, "_announce", lambda addresses, sizes: announced.append(sizes))
    with TrainLoader(shards, basis, settings()) as feed:
        next(feed)
        ahead, deadline = settings().queue_depth + ANNOUNCED_AHEAD + 1, time.monotonic() + 10
        while len(announced) < 1 + ahead and time.monotonic() < deadline:
            pass
        visible = len(announced)
        batches = list(islice(feed, 3))
    assert visible == 1 + ahead
    for batch, sizes in zip(batches, announced[1:], strict=False):
        assert np.array_equal(sizes, shards.index["size"][batch.ids])


def test_wrong_use_is_refused(shards, basis):
    """The user's mistakes are named before anything runs."""
    with pytest.raises(ValueError, match="27 samples do not fill one batch of 28"):
        TrainLoader(shards, basis, settings(batch=28))
    with pytest.raises(ValueError, match="batch of 9 cannot be shared evenly by 2 ranks"):
        TrainLoader(shards, basis, settings(batch=9), ranks=2)
    with pytest.raises(ValueError, match="start_step is 4, but an epoch has 3"):
        TrainLoader(shards, basis, settings(), start_step=4)
    with pytest.raises(ValueError, match="2 views"):
        next(view_loader(shards, basis, settings(), views=2))


def test_rates_count_what_came_in_the_window():
    """Rivals take turns, each with a fresh iterator that is closed after it; what is discarded does not count."""
    calls = []

    def sizes(name):
        def endless():
            try:
                for number in range(10**6):
                    yield 10**9 if number < 2 else 8  # the first two would be noticed
            finally:
                calls.append(name)

        return endless

    turns = []
    rates = measure_throughput({"a": sizes("a"), "b": sizes("b")}, 0.02, 3, turns.append, discard=2)
    assert calls == ["a", "b"] * 3 and turns == [1] * 6
    for rate in rates.values():
        assert 0 < rate.img_s_min <= rate.img_s <= rate.img_s_max < 10**9
        assert np.isclose(rate.cores_used, rate.cpu_ms_per_img * rate.img_s / 1000, rtol=0.5, atol=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 0},
        {"seed": -1},
        {"device": "tpu"},
        {"threads": 0},
        {"queue_depth": 0},
        {"mean": "median"},
        {"order": "stored"},
        {"window_shards": 0},
        {"on_bad_sample": "guess"},
        {"max_bad_samples": 0},
        {"positions": 34},
        {"hw_decoder_load": 1.5},
    ],
    ids=str,
)
def test_settings_are_checked(changes):
    """Every setting that cannot be is refused by name."""
    with pytest.raises(ValueError, match=next(iter(changes)).replace("positions", "crop positions")):
        LoaderSettings(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_without_a_device(shards, basis):
    """Asking for the GPU where there is none says so, instead of running elsewhere."""
    with pytest.raises(ValueError, match="no CUDA device"):
        TrainLoader(shards, basis, settings(device="cuda"))


def test_real_photographs(tmp_path, basis):
    """On photographs, too, the feed's pixels are the reference's."""
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
    with TrainLoader(shards, basis, how) as feed:
        batches = islice(feed, feed.steps_per_epoch)
        largest = max(np.abs(b.images.numpy() - expected_images(shards, basis, how, b)).max() for b in batches)
    print(f"{len(photos)} photographs, largest difference {largest:.2e} grey levels")
    assert largest < GREY_LEVELS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mean", ["image", "channel"])
def test_gpu_twin(shards, basis, mean):
    """On the GPU: the same samples, decoding within a grey level on average, the rest of the arithmetic exact."""
    how = settings(mean=mean)
    on_cpu = take(shards, basis, 4, how)
    on_gpu = take(shards, basis, 4, settings(mean=mean, device="cuda"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.images.is_cuda and gpu.labels.is_cuda and gpu.ids.is_cuda
        assert gpu.ids.tolist() == cpu.ids.tolist() and gpu.labels.tolist() == cpu.labels.tolist()
        assert (gpu.images.cpu() - cpu.images).abs().mean() * 1.1 < 1
    views_cpu, views_gpu = (
        next(view_loader(shards, basis, settings(mean=mean, device=d), 10)) for d in ("cpu", "cuda")
    )
    assert (views_gpu.images.cpu() - views_cpu.images).abs().mean() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_crop_mirror_and_lighting_are_exact(tmp_path, basis):
    """On pictures of one colour, which every decoder decodes alike, and a ramp of grey, the GPU gives the reference."""
    ramp = np.broadcast_to((np.arange(320) // 16 * 12).astype(np.uint8)[None, :, None], (256, 320, 3))
    samples = [Sample(f"ramp_{n}", 0, jpeg_of(Image.fromarray(ramp)), 320, 256) for n in range(16)]
    shards = write_set(tmp_path, samples)
    how = settings(device="cuda")
    (batch,) = take(shards, basis, 1, how)
    difference = np.abs(batch.images.cpu().numpy() - expected_images(shards, basis, how, batch))
    assert np.median(difference) < GREY_LEVELS  # edges of the ramp may be decoded otherwise, flat parts may not
