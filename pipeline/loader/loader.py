"""The data loader: a shard set in, batches of float32 (N, 3, 224, 224) RGB crops out, on the loader's device.

`TrainLoader` is endless; `view_loader` goes through a set once. There is no state to save: every batch is a pure
function of (shard set, settings, epoch, step), whatever the number of ranks or threads. To resume, pass (epoch, step).
Pixel values are 0-255 minus the mean, with PCA (principal component analysis) lighting noise, as `augment.py` says. The
caller owns the batches: later batches do not overwrite them.
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
from pipeline.loader.inputs import BatchInputs, TrainPlanner, ViewPlanner, graph_settings, mean_residual
from pipeline.loader.normalise import mirror_normalise, normalised_views, rows_of
from pipeline.loader.order import Ids, evaluation_batches, local_batch, steps_per_epoch
from pipeline.loader.runner import Runner
from pipeline.loader.settings import LoaderSettings
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet


@dataclass(frozen=True)
class Batch:
    """A batch of N samples; all tensors are on the loader's device.

    Attributes:
        images: float32 (N, 3, 224, 224), or (N, views, 3, 224, 224) from `view_loader`. With `crops_only` uint8
            (N, 224, 224, 3), which `TrainLoader.finish` makes images of.
        labels: int64 (N,) class indices.
        ids: int64 (N,) sample ids.
        epoch: counts from 0.
        step: counts from 0 in each epoch.
        left_out: the damaged samples that `view_loader` left out of this batch: the place and the reason of each.
        rows: with `crops_only` float32 (N, 5), what `finish` needs of each sample.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    epoch: int
    step: int
    left_out: tuple[str, ...] = ()
    rows: torch.Tensor | None = None


class TrainLoader:
    """An endless iterator over one rank's part of every global batch.

    It prefetches across the ends of epochs. Use it as a context manager, or call `close`.

    Args:
        shards: the shard set.
        basis: the eigenbasis of the shard set.
        settings: how the loader works; the same on all ranks.
        start_epoch: the epoch of the first batch.
        start_step: the step of the first batch.
        rank: 0 to ranks - 1.
        ranks: how many ranks share each global batch.
        crops_only: yield crops before mirroring and normalisation. A pair of GPUs swaps them as uint8.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        finish: makes the images of the crops and `rows` of a batch, bit by bit those that the loader would yield
            itself. None without `crops_only`.

    Raises:
        ValueError: the set does not fill a batch, the ranks cannot share the batch evenly, or the CUDA device is
            missing. While iterating: an image cannot be decoded and must not be skipped.
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
        crops_only: bool = False,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(len(shards), settings.batch)
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {start_step}, but an epoch has {self.steps_per_epoch} steps")
        dali = graph_settings(settings, local_batch(settings.batch, ranks), shards)
        graph = partial(train_graph, dali, "decode" if crops_only else "full")
        planner = TrainPlanner(shards, basis, settings, rank, ranks)
        batches = planner.with_images(planner.batches(start_epoch, start_step))
        self._skipped = planner.skipped
        self._runner = Runner(graph, planner, batches, settings.queue_depth)
        self._to_batch = _BatchBuilder(basis, settings, crops_only=crops_only)
        self.finish = partial(mirror_normalise, residual=self._to_batch.residual) if crops_only else None

    @property
    def bad_samples(self) -> tuple[str, ...]:
        """The images that this rank has skipped so far: the place (tar, byte offset, key) and the reason of each."""
        return tuple(self._skipped.values())

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        return self._to_batch(*self._runner.next(self._to_batch.stream))

    def close(self) -> None:
        """Stops the pipeline and frees its threads and memory. Batches that were returned stay valid."""
        self._runner.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def view_loader(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, views: int = 1, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Yields every sample exactly once, in the order of ids and without noise; the last batch may be short.

    With `on_bad_sample="skip"` damaged samples are left out: scores on substitutes would be wrong.

    Every rank gets the same number of batches, and its own rows of each. Of the last batch a rank may get no row.
    Exhaust the iterator or close it.

    Args:
        shards: the shard set.
        basis: the eigenbasis of the training set, whose mean is subtracted.
        settings: how the loader works; the same on all ranks.
        views: 1 for the centre crop, 10 for the corners, the centre and their mirror images (paper section 4.1).
        rank: 0 to ranks - 1.
        ranks: how many ranks share each batch.

    Raises:
        ValueError: `views` is neither 1 nor 10, the CUDA device is missing, or an image cannot be decoded.
    """
    if views not in (1, 10):
        raise ValueError(f"{views} views; choose 1 (the centre) or 10 (corners, centre and their mirror images)")
    shares = [len(ids) for ids in evaluation_batches(len(shards), settings.batch, rank, ranks)]
    nonempty = sum(share > 0 for share in shares)
    if nonempty:
        dali = graph_settings(settings, max(shares), shards)
        depth = min(dali.queue_depth, nonempty)  # a pipeline cannot start with fewer batches than its queue holds
        graph = partial(view_graph, replace(dali, queue_depth=depth), views)
        planner = ViewPlanner(shards, basis, settings, rank, ranks)
        runner = Runner(graph, planner, planner.with_images(planner.batches()), depth)
        to_batch = _BatchBuilder(basis, settings, views)
        try:
            for _ in range(nonempty):
                inputs, outputs = runner.next(to_batch.stream)
                yield _without_substitutes(to_batch(inputs, outputs), inputs)
        finally:
            runner.close()
    for step in range(nonempty, len(shares)):  # this rank has no row of these, but the other ranks have some
        none = torch.empty(0, dtype=torch.int64, device=settings.device)
        yield Batch(torch.empty(0, views, 3, CROP, CROP, device=settings.device), none, none, 0, step)


def _without_substitutes(batch: Batch, inputs: BatchInputs) -> Batch:
    if not inputs.substituted:
        return batch
    rows = [row for row in range(len(inputs.ids)) if row not in inputs.substituted]
    kept = torch.tensor(rows, dtype=torch.int64, device=batch.images.device)
    images, labels, ids = batch.images[kept], batch.labels[kept], batch.ids[kept]
    return replace(batch, images=images, labels=labels, ids=ids, left_out=tuple(inputs.damaged.values()))


def stage_loader(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, stage: Stage, start_step: int = 0
) -> Iterator[Ids]:
    """Yields the sample ids (N,) of `TrainLoader`'s batches without end, processed up to `stage`. For timing."""
    if stage == "full":
        with TrainLoader(shards, basis, settings, start_step=start_step) as loader:
            while True:
                yield next(loader).ids.numpy(force=True)
    graph = partial(train_graph, graph_settings(settings, settings.batch, shards), stage)
    planner = TrainPlanner(shards, basis, settings)
    # A graph that decodes nothing cannot fail on a broken header, and must not skip a sample for it.
    batches = planner.with_images(planner.batches(0, start_step), check=stage != "read")
    runner = Runner(graph, planner, batches, settings.queue_depth)
    try:
        while True:
            _, (_, tags) = runner.next(None)
            yield np.array(tags.as_tensor())[:, 1]
    finally:
        runner.close()


def stage_batch_sizes(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, stage: Stage, start_step: int = 0
) -> Iterator[int]:
    """Yields the batch sizes of `stage_loader`, which is the kind of iterator that `measure_throughput` needs."""
    return (len(ids) for ids in stage_loader(shards, basis, settings, stage, start_step))


class _BatchBuilder:
    """Makes a `Batch` of the outputs of a graph. On the GPU it mirrors and normalises; on the CPU the graph does so.

    Args:
        basis: the eigenbasis whose mean is subtracted.
        settings: of the loader.
        views: of evaluation; 0 in training.
        crops_only: whether the batches are to stay crops.

    Attributes:
        stream: the CUDA stream of the loader's work; None on the CPU.
        residual: the mean image minus the channel means, on the loader's device.
    """

    def __init__(self, basis: Eigenbasis, settings: LoaderSettings, views: int = 0, crops_only: bool = False) -> None:
        self.device = torch.device(settings.device)
        # The loader's work is on a stream of its own: waiting for a batch then does not wait for the trainer's kernels.
        self.stream = torch.cuda.Stream() if settings.device == "cuda" else None  # type: ignore[no-untyped-call]
        self.residual = torch.from_numpy(mean_residual(basis, settings.mean)).to(self.device)
        self._views, self._crops_only = views, crops_only

    def __call__(self, inputs: BatchInputs, outputs: tuple[Any, Any]) -> Batch:
        dali_images, dali_tags = outputs
        tags = np.array(dali_tags.as_tensor()).T.copy()
        assert np.array_equal(tags[1], inputs.ids)
        if self.stream is None:
            # from_dlpack shares DALI's memory without a copy. That is safe on the CPU: DALI allocates fresh memory for
            # every batch and keeps it until the tensor is gone.
            images, (labels, ids) = from_dlpack(dali_images.as_tensor()), torch.from_numpy(tags)
            rows = self._rows(inputs) if self._crops_only else None
        else:
            images, (labels, ids), rows = self._on_gpu(
                self.stream, dali_images, torch.from_numpy(tags), self._rows(inputs)
            )
        return Batch(images, labels, ids, inputs.epoch, inputs.step, rows=rows if self._crops_only else None)

    def _rows(self, inputs: BatchInputs) -> torch.Tensor:
        return torch.from_numpy(rows_of(inputs.tensors, len(inputs.ids)))

    def _on_gpu(
        self, stream: torch.cuda.Stream, dali_images: Any, tags: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Finishes the images on the loader's stream, in torch's own memory.

        DALI may reuse its buffer as soon as the work on `stream` is done. A tensor that shared the buffer could be
        overwritten while a kernel of the trainer still reads it.

        The host waits for DALI only: its time in `next` is then the time spent waiting for input, which the stall
        report counts, and 0 if the batch is decoded already. For the kernels of this method the trainer's stream waits
        and not the host, which would otherwise launch the next step late.
        """
        with torch.cuda.stream(stream):
            decoded = stream.record_event()
            tags, rows = (each.to(self.device, non_blocking=True) for each in (tags, rows))
            images = self._finished(from_dlpack(dali_images.as_tensor()), rows)
            ready = stream.record_event()
        trainer = torch.cuda.current_stream()
        trainer.wait_event(ready)
        for tensor in (images, tags, rows):
            # These tensors were allocated on `stream`. record_stream tells torch's allocator that the trainer's stream
            # uses them too; otherwise it could reuse their memory before the trainer's kernels have read it.
            tensor.record_stream(trainer)
        decoded.synchronize()
        return images, tags, rows

    def _finished(self, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if self._crops_only:
            return pixels.clone()
        if self._views:
            return normalised_views(pixels, rows, self.residual, self._views)
        return mirror_normalise(pixels, rows, self.residual)
