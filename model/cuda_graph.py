"""A training step that is recorded once as a CUDA graph and then replayed: one launch instead of hundreds.

A replay runs the same kernels on the same memory. What changes from step to step is therefore written into fixed
memory before it: images, labels, and the keys of the dropout masks. Learning rates are arguments of the kernels, so the
step is recorded again when the schedule changes them, a few times in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from model.alexnet import AlexNet
from model.batch import Batch
from model.dropout import DropoutDraws, empty_keys
from model.optim import Momentum2012
from model.parallel.half_batches import PairBatch
from model.train_step import train_step

WARM_UP_STEPS = 3  # cuDNN measures its algorithms and libraries allocate memory, which a recording must not do


class StepGraph(Protocol):
    """What `GraphedStep` needs of a graph. The work is a function without arguments and results."""

    def run(self, work: Callable[[], None]) -> None:
        """Runs the work without recording it."""
        ...

    def record(self, work: Callable[[], None]) -> None:
        """Records the work without running it, in place of what was recorded before."""
        ...

    def replay(self) -> None:
        """Runs what was recorded."""
        ...


class CudaGraph:
    """A CUDA graph of one stream."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the default stream cannot be recorded
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Runs the work on the stream on which it will be recorded."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> None:
        """Records the work. Other threads, such as those of the data loader, may use the device meanwhile."""
        if self._graph is not None:
            self._graph.reset()  # frees its memory before the next recording takes as much
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        """Launches the graph on the current stream."""
        assert self._graph is not None, "nothing was recorded"
        self._graph.replay()


class GraphedStep:
    """`train_step` on one rank, as a graph. The first steps run without it.

    Args:
        model: the network, both towers.
        optimizer: of the same parameters.
        precision: one of `model.recipe.PRECISIONS`.
        graph: records and replays.
    """

    def __init__(self, model: AlexNet, optimizer: Momentum2012, precision: str, graph: StepGraph) -> None:
        self._model, self._optimizer, self._precision, self._graph = model, optimizer, precision, graph
        self._warmed_up = 0
        self._recorded: list[float] | None = None  # the learning rates that were recorded
        self._batch: PairBatch | None = None  # fixed memory, like all that `_work` reads
        self._draws = DropoutDraws(0, 0)
        self._results = torch.empty(0)

    def __call__(self, batch: Batch, draws: DropoutDraws) -> tuple[Tensor, Tensor]:
        """One optimizer step; arguments and results are those of `train_step`.

        All batches must have the shape of the first one.
        """
        self._load(batch, draws)
        learning_rates = [group["lr"] for group in self._optimizer.param_groups]
        if self._warmed_up < WARM_UP_STEPS:
            self._warmed_up += 1
            self._graph.run(self._work)
        else:
            if learning_rates != self._recorded:
                self._optimizer.zero_grad()  # frees what lies in the memory of an earlier recording
                self._graph.record(self._work)
                self._recorded = learning_rates
            self._graph.replay()
        loss, correct = self._results.clone().unbind()  # the next replay overwrites the results
        return loss, correct

    def _load(self, batch: Batch, draws: DropoutDraws) -> None:
        """Copies what changes from step to step to where the graph reads it."""
        if self._batch is None:
            images, labels = torch.empty_like(batch.images), torch.empty_like(batch.labels)
            self._batch = PairBatch(images, labels, 0, 0)
            self._results = torch.empty(2, device=images.device, dtype=torch.float64)
            self._draws = replace(draws, keys=empty_keys(self._model.recipe, images.device))
        assert batch.images.shape == self._batch.images.shape, "a graph has one shape of batches"
        assert draws.first_row == self._draws.first_row
        self._batch.images.copy_(batch.images)
        self._batch.labels.copy_(batch.labels)
        assert self._draws.keys is not None
        draws.fill_keys(self._draws.keys)

    def _work(self) -> None:
        assert self._batch is not None
        results = train_step(self._model, self._optimizer, self._batch, self._draws, self._precision)
        for result, found in zip(self._results, results, strict=True):
            result.copy_(found)
