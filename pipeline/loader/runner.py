"""Runs batches through a DALI pipeline, and replaces damaged samples when DALI fails on a batch.

Three queues follow one another. The planner reads `READ_AHEAD_BATCHES` batches ahead of the batch that it yields.
`ReadAhead` runs the planner in a thread and keeps one batch ready. DALI works on `queue_depth` batches. `Runner.next`
waits for the oldest of these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from pipeline.loader.inputs import BatchInputs, BatchPlanner

if TYPE_CHECKING:
    from pipeline.loader.graphs import Graph


class ReadAhead:
    """Prepares batches in a thread, each before it is needed.

    The Python code takes 1.2 ms for a batch of 128 images. Without the thread every training step would wait for it.
    """

    def __init__(self, batches: Generator[BatchInputs]) -> None:
        self._batches = batches
        self._thread = ThreadPoolExecutor(1)
        self._pending = deque[Future[BatchInputs | None]]()
        self._first = deque[BatchInputs]()

    def fill(self) -> None:
        """Lets the thread prepare the next batch, if it is not doing so.

        Call it when there is time left: the thread then competes with the caller for Python's global lock.
        """
        if not self._pending:
            self._pending.append(self._thread.submit(next, self._batches, None))

    def put_first(self, batches: list[BatchInputs]) -> None:
        """Makes `next` return these batches before all others."""
        self._first = deque([*batches, *self._first])

    def next(self) -> BatchInputs | None:
        """Returns the next batch, or None after the last one."""
        if self._first:
            return self._first.popleft()
        self.fill()
        return self._pending.popleft().result()

    def close(self) -> None:
        """Stops the thread and the generator of batches."""
        self._thread.shutdown(cancel_futures=True)
        self._batches.close()


class Runner:
    """Keeps `queue_depth` batches in a DALI pipeline, and matches each output with its inputs.

    Args:
        make_graph: makes a new graph; called again after an error.
        planner: replaces damaged samples, and decides whether they may be skipped.
        batches: the inputs, in order.
        queue_depth: batches that the graph's pipeline holds.
    """

    def __init__(
        self, make_graph: Callable[[], Graph], planner: BatchPlanner, batches: Generator[BatchInputs], queue_depth: int
    ) -> None:
        self._make_graph, self._planner = make_graph, planner
        self._read_ahead = ReadAhead(batches)
        self._in_dali: deque[BatchInputs] = deque()
        self._graph: Graph | None = None
        self._start(queue_depth)

    def next(self, stream: torch.cuda.Stream | None) -> tuple[BatchInputs, tuple[Any, Any]]:
        """Returns the inputs and outputs of the oldest batch, and starts another batch.

        On the CPU the outputs are complete. On the GPU work that is queued on `stream` runs after they are complete.

        Raises:
            ValueError: the loader is closed, or an image cannot be decoded and must not be skipped.
            RuntimeError: DALI failed and no image explains it.
        """
        if self._graph is None:
            raise ValueError("this loader is closed; create a new one")
        while True:
            try:
                outputs = self._graph.pipeline.outputs(stream)
                break
            except RuntimeError as error:
                self._restart_without_damaged(error)
        batch = self._in_dali.popleft()
        try:
            self._planner.accept(batch)
            if self._submit():
                self._graph.pipeline.schedule_run()
                self._read_ahead.fill()
        except ValueError:
            self.close()
            raise
        return batch, outputs

    def close(self) -> None:
        """Stops the pipeline and the read-ahead thread."""
        self._graph = None  # the pipeline stops its threads when its last reference is gone
        self._read_ahead.close()

    def _submit(self) -> bool:
        """Gives DALI the inputs of the next batch; returns False after the last batch."""
        assert self._graph is not None
        batch = self._read_ahead.next()
        if batch is None:
            return False
        for name in self._graph.inputs:
            self._graph.pipeline.feed_input(name, batch.tensors[name])
        self._in_dali.append(batch)
        return True

    def _start(self, batches: int) -> None:
        """Makes a new pipeline and submits the next `batches`, as many as its queue holds."""
        self._graph = self._make_graph()
        self._in_dali.clear()
        for _ in range(batches):
            self._submit()
        self._graph.pipeline.schedule_run()  # DALI's first call starts as many batches as its queue holds

    def _restart_without_damaged(self, error: RuntimeError) -> None:
        """Replaces the damaged samples of the oldest batch, and runs all batches in DALI again in a new pipeline.

        DALI declares a pipeline invalid after an error: its next outputs would be those of the following batch, and the
        failed batch would be lost. If the samples cannot be replaced, this closes the loader and raises.
        """
        batch = self._in_dali[0]
        self._graph = None
        try:
            replaced = self._planner.without_undecodable(batch)
            if replaced is None:
                error.add_note(f"in the batch of epoch {batch.epoch}, step {batch.step}; DALI decodes each image alone")
                raise error
        except (RuntimeError, ValueError):
            self.close()
            raise
        self._read_ahead.put_first([replaced, *list(self._in_dali)[1:]])
        self._start(len(self._in_dali))
