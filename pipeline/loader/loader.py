"""The feed: a shard set in, batches of float32 (N, 3, 224, 224) RGB crops out, on the loader's device.

`TrainLoader` is endless and `view_loader` goes through a set once. There is no state to save: every batch is a pure
function of (shard set, settings, epoch, step), whatever the number of ranks or threads, so resuming is naming
(epoch, step). Pixels are in grey levels 0..255, minus the mean, lit and divided as `augment.py` says. Batches are the
caller's to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from pipeline.loader.augment import CROP
from pipeline.loader.graphs import Stage, train_graph, view_graph
from pipeline.loader.inputs import Ids, Plan, Work, engine_for, residual_of, view_work
from pipeline.loader.order import evaluation_batches, local_batch, steps_per_epoch
from pipeline.loader.runner import Runner
from pipeline.loader.settings import LoaderSettings
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet


@dataclass(frozen=True)
class Batch:
    """A batch of N: `images` float32 (N, 3, 224, 224), or (N, views, 3, 224, 224) from `view_loader`; `labels` and sample
    `ids` int64 (N,); all on the loader's device. `epoch` and `step` count from 0."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    epoch: int
    step: int


class TrainLoader:
    """Endless iterator over this rank's part of every global batch, from `start_step` of `start_epoch` on.

    Prefetches across the edges of epochs. Use it as a context manager or `close` it. ValueError where the set does not
    fill a batch, the batch cannot be shared by the ranks, there is no CUDA device, or a picture cannot be decoded and
    may not be skipped.
    """

    def __init__(
        self,
        shards: ShardSet,
        basis: Eigenbasis,
        settings: LoaderSettings,
        start_epoch: int = 0,
        start_step: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(len(shards), settings.batch)
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {start_step}, but an epoch has {self.steps_per_epoch} steps")
        graph = partial(train_graph, engine_for(settings, local_batch(settings.batch, ranks)))
        plan = Plan(shards, basis, settings, rank, ranks)
        self._skipped = plan.skipped
        self._runner = Runner(graph, shards, plan.work(start_epoch, start_step), settings.queue_depth, plan.mended)
        self._finish = _Finish(basis, settings)

    @property
    def bad_samples(self) -> tuple[str, ...]:
        """The pictures that this rank has skipped so far: where they are, and why."""
        return tuple(self._skipped.values())

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        return self._finish(*self._runner.next(self._finish.stream))

    def close(self) -> None:
        """Stops the pipeline and gives its threads and memory back. Batches handed out stay valid."""
        self._runner.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def view_loader(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, views: int = 1, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Every sample exactly once, in the order of ids, unlit: images (N, views, 3, 224, 224); the last batch is short.

    1 view is the centre crop, 10 are P 4.1's corners, centre and their mirror images. Every rank gets as many batches,
    of which it has its rows; of the last one that may be none. Close the iterator, or use it up.
    """
    if views not in (1, 10):
        raise ValueError(f"{views} views; choose 1 (the centre) or 10 (corners, centre and their mirror images)")
    shares = [len(ids) for ids in evaluation_batches(len(shards), settings.batch, rank, ranks)]
    batches = sum(share > 0 for share in shares)
    if batches:
        engine = engine_for(settings, max(shares))
        depth = min(engine.queue_depth, batches)
        graph = partial(view_graph, replace(engine, queue_depth=depth), views)
        work = view_work(shards, basis, settings, rank, ranks)
        runner, finish = Runner(graph, shards, work, depth), _Finish(basis, settings)
        try:
            for _ in range(batches):
                yield finish(*runner.next(finish.stream))
        finally:
            runner.close()
    for step in range(batches, len(shares)):
        none = torch.empty(0, dtype=torch.int64, device=settings.device)
        yield Batch(torch.empty(0, views, 3, CROP, CROP, device=settings.device), none, none, 0, step)


def stage_loader(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, stage: Stage, start_step: int = 0
) -> Iterator[Ids]:
    """For timing: `TrainLoader`'s batches, endlessly, done as far as `stage`; only their sample ids (N,) are given."""
    if stage == "full":
        with TrainLoader(shards, basis, settings, start_step=start_step) as feed:
            while True:
                yield next(feed).ids.numpy(force=True)
    graph = partial(train_graph, engine_for(settings, settings.batch), stage)
    plan = Plan(shards, basis, settings)
    runner = Runner(graph, shards, plan.work(0, start_step), settings.queue_depth, plan.mended)
    try:
        while True:
            _, (_, tags) = runner.next(None)
            yield np.array(tags.as_tensor())[:, 1]
    finally:
        runner.close()


def stage_batch_sizes(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, stage: Stage, start_step: int = 0
) -> Iterator[int]:
    """Batch sizes of `stage_loader`, which is what `measure_throughput` counts."""
    return (len(ids) for ids in stage_loader(shards, basis, settings, stage, start_step))


class _Finish:
    """Makes a Batch of a graph's outputs: into torch, and on the GPU minus what the mean image has beyond the channel
    means, which is done here in one kernel (on the CPU the graph has done it)."""

    def __init__(self, basis: Eigenbasis, settings: LoaderSettings) -> None:
        self.device = torch.device(settings.device)
        # All of a GPU batch's work is on a stream of its own, so that waiting for it does not wait for the training.
        self.stream = torch.cuda.Stream() if settings.device == "cuda" else None  # type: ignore[no-untyped-call]
        self._residual = torch.from_numpy(residual_of(basis, settings.mean)).to(self.device)

    def __call__(self, work: Work, outputs: tuple[Any, Any]) -> Batch:
        dali_images, dali_tags = outputs
        tags = np.array(dali_tags.as_tensor()).T.copy()
        assert np.array_equal(tags[1], work.ids)
        if self.stream is None:
            images, (labels, ids) = from_dlpack(dali_images.as_tensor()), torch.from_numpy(tags)
        else:
            images, (labels, ids) = self._on_gpu(self.stream, dali_images, torch.from_numpy(tags), work.divisor)
        return Batch(images, labels, ids, work.epoch, work.step)

    def _on_gpu(
        self, stream: torch.cuda.Stream, dali_images: Any, tags: torch.Tensor, divisor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies into torch's own memory: DALI's is then given back in the order of `stream`, not when some kernel of
        the trainer may still read it."""
        with torch.cuda.stream(stream):
            images = torch.sub(from_dlpack(dali_images.as_tensor()), self._residual, alpha=1 / divisor)
            tags = tags.to(self.device, non_blocking=True)
            ready = stream.record_event()
        ready.synchronize()  # here, so that time spent in `next` is time waited for the input
        for tensor in (images, tags):
            tensor.record_stream(torch.cuda.current_stream())
        return images, tags
