"""Normalisation in torch, as on a GPU: bit-identical to the compiled operator, and without a wait of the host.

The GPU's code runs here on CPU tensors, with a fake in place of CUDA's streams.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.loader import inputs
from pipeline.loader.augment import STORED, Lighting, central_origin
from pipeline.loader.dali_batches import BatchBuilder
from pipeline.loader.inputs import MOST_PREALLOCATED, graph_settings, mean_residual
from pipeline.loader.loader import TrainLoader, view_loader
from pipeline.loader.normalise import COLUMNS, MEAN, MIRROR, STD, normalised_views
from tests.support.loader_fixtures import BATCH, settings, take
from tests.support.shard_fixtures import decoded


@pytest.mark.parametrize(
    "how", [{}, {"mean": "channel"}, {"lighting": Lighting("paper")}, {"lighting_until": 1, "seed": 5}], ids=str
)
def test_finished_crops_are_the_images_bit_by_bit(shards, basis, how):
    """Over two epochs, with mirrored and other samples."""
    whole = take(shards, basis, 5, settings(**how))
    mirrored = set()
    with TrainLoader(shards, basis, settings(**how), crops_only=True) as loader:
        assert loader.finish is not None
        for expected in whole:
            batch = next(loader)
            assert batch.images.dtype == torch.uint8 and batch.images.shape == (BATCH, 224, 224, 3)
            assert batch.rows is not None
            mirrored |= set(batch.rows[:, 0].tolist())
            images = loader.finish(batch.images, batch.rows)
            assert images.is_contiguous() and torch.equal(images, expected.images)
            assert torch.equal(batch.labels, expected.labels) and torch.equal(batch.ids, expected.ids)
    assert mirrored == {0, 1} and whole[0].rows is None


@pytest.mark.parametrize("views", [1, 10])
def test_views_of_squares_are_the_views_of_the_loader_bit_by_bit(shards, basis, views):
    batch = next(view_loader(shards, basis, settings(), views))
    squares = []
    for sample_id in batch.ids.tolist():
        image = decoded(shards, sample_id)
        top, left = central_origin(image.shape[0]), central_origin(image.shape[1])
        squares.append(torch.from_numpy(image[top : top + STORED, left : left + STORED].copy()))
    rows = torch.zeros(len(squares), COLUMNS)
    rows[:, MEAN], rows[:, STD] = torch.from_numpy(basis.mean.astype(np.float32)), 1
    found = normalised_views(torch.stack(squares), rows, torch.from_numpy(mean_residual(basis, "image")), views)
    assert torch.equal(found, batch.images) and not rows[:, MIRROR].any()


class Stream:
    """CUDA's streams and events as far as the loader uses them; writes every call into `log`."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def record_event(self) -> Stream:
        """An event behind all work so far."""
        self.events += 1
        self.log.append(f"{self.name} records {self.events}")
        return Stream(f"{self.name} {self.events}", self.log)

    def wait_event(self, event: Stream) -> None:
        """Later work of this stream waits."""
        self.log.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        """The host waits."""
        self.log.append(f"host waits for {self.name}")


@pytest.mark.parametrize("crops_only", [False, True])
def test_the_host_waits_for_dali_only_and_the_trainer_s_stream_for_the_rest(shards, basis, crops_only, monkeypatch):
    """Event 1 is behind DALI's work, event 2 behind the loader's own kernels. The batch is that of the CPU."""
    log, used = list[str](), list[tuple[torch.Tensor, Any]]()
    trainer, how = Stream("trainer", log), settings()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: trainer)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append((tensor, stream)))
    builder = BatchBuilder(basis, how, crops_only=crops_only)
    builder.stream = Stream("loader", log)  # type: ignore[assignment]
    with TrainLoader(shards, basis, how, crops_only=True) as loader:  # as on a GPU, its graph only decodes and crops
        batch = builder(*loader._batches._runner.next(None))
    assert log == ["loader records 1", "loader records 2", "trainer waits for loader 2", "host waits for loader 1"]
    kept = [batch.images, batch.labels, batch.ids]
    assert all(any(tensor.data_ptr() == one.data_ptr() for one, _ in used) for tensor in kept[:2])
    assert {stream for _, stream in used} == {trainer}
    (expected,) = take(shards, basis, 1, how)
    if crops_only:
        with TrainLoader(shards, basis, how, crops_only=True) as loader:
            expected = next(loader)
    assert torch.equal(batch.images, expected.images) and torch.equal(batch.ids, expected.ids)


def test_the_engines_get_memory_for_the_largest_image(shards, monkeypatch):
    """Only if they decode; a side counts as at most MOST_PREALLOCATED."""
    monkeypatch.setattr(inputs, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    used, unused = settings(device="cuda", hw_decoder_load=0.65), settings(device="cuda")
    found = graph_settings(used, BATCH, shards)
    assert (found.largest, found.device_id, found.hw_decoder_load) == ((512, 384), 3, 0.65)
    assert graph_settings(unused, BATCH, shards).largest == (0, 0)
    assert graph_settings(settings(), BATCH, shards).largest == (0, 0)
    index = shards.index.copy()
    index["width"][0] = 30000
    wide = SimpleNamespace(index=index)
    assert graph_settings(used, BATCH, wide).largest == (MOST_PREALLOCATED, 384)
