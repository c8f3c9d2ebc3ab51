"""The batches of the loader as DALI makes them, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from pipeline.loader.batch import Batch, without_substitutes
from pipeline.loader.graphs import train_graph, view_graph
from pipeline.loader.inputs import BatchInputs, TrainPlanner, ViewPlanner, graph_settings, mean_residual
from pipeline.loader.normalise import mirror_normalise, normalised_views, rows_of
from pipeline.loader.order import Ids
from pipeline.loader.runner import Runner
from pipeline.loader.settings import LoaderSettings, Stage
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet


class TrainingBatches:
    """One rank's training batches.

    Args:
        shards, basis, settings: see `TrainLoader`.
        planner: which samples are in a batch, and what is drawn for them.
        start: epoch and step of the first batch.
        rows: samples of this rank in a batch.
        crops_only: see `TrainLoader`.
    """

    def __init__(
        self,
        shards: ShardSet,
        basis: Eigenbasis,
        settings: LoaderSettings,
        planner: TrainPlanner,
        start: tuple[int, int],
        rows: int,
        crops_only: bool,
    ) -> None:
        graph = partial(train_graph, graph_settings(settings, rows, shards), "decode" if crops_only else "full")
        batches = planner.with_images(planner.batches(*start))
        self._runner = Runner(graph, planner, batches, settings.queue_depth)
        self._to_batch = BatchBuilder(basis, settings, crops_only=crops_only)

    def next(self) -> Batch:
        """The next batch."""
        return self._to_batch(*self._runner.next(self._to_batch.stream))

    def close(self) -> None:
        """Stops the pipeline and frees its threads and memory."""
        self._runner.close()


def view_batches(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, planner: ViewPlanner, views: int, shares: list[int]
) -> Iterator[Batch]:
    """The rank's evaluation batches in which it has samples.

    Args:
        shards, basis, settings, views: see `view_loader`.
        planner: which samples are in a batch.
        shares: samples of this rank in each batch, all above 0.
    """
    dali = graph_settings(settings, max(shares), shards)
    depth = min(dali.queue_depth, len(shares))  # a pipeline cannot start with fewer batches than its queue holds
    graph = partial(view_graph, replace(dali, queue_depth=depth), views)
    runner = Runner(graph, planner, planner.with_images(planner.batches()), depth)
    to_batch = BatchBuilder(basis, settings, views)
    try:
        for _ in shares:
            inputs, outputs = runner.next(to_batch.stream)
            yield without_substitutes(to_batch(inputs, outputs), inputs)
    finally:
        runner.close()


def stage_ids(
    shards: ShardSet, settings: LoaderSettings, planner: TrainPlanner, stage: Stage, step: int
) -> Generator[Ids]:
    """The sample ids (N,) of batches from `step` on that are processed up to "read" or "decode"."""
    graph = partial(train_graph, graph_settings(settings, settings.batch, shards), stage)
    # A graph that decodes nothing cannot fail on a broken header, and must not skip a sample for it.
    batches = planner.with_images(planner.batches(0, step), check=stage != "read")
    runner = Runner(graph, planner, batches, settings.queue_depth)
    try:
        while True:
            _, (_, tags) = runner.next(None)
            yield np.array(tags.as_tensor())[:, 1]
    finally:
        runner.close()


class BatchBuilder:
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
        """Takes what `Runner.next` returns."""
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
        drawn = {"mirror", "mean", "std"} & inputs.tensors.keys()
        arrays = {name: inputs.tensors[name].as_array() for name in drawn}
        return torch.from_numpy(rows_of(arrays, len(inputs.ids)))

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
