"""TODO-DOC pipeline.loader.runner (from pipeline.loader)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from pipeline.loader.bad_samples import REMEDY, damaged, several
from pipeline.loader.graphs import Graph
from pipeline.loader.inputs import Work
from pipeline.loader.settings import ANNOUNCED_AHEAD
from pipeline.shards.reader import ShardSet

Mend = Callable[[Work, dict[int, str]], Work | None]


class _Ahead:
    """Makes work in a thread of its own, `ANNOUNCED_AHEAD` batches before it is wanted: what Python takes for a batch,
    1.2 ms for 128 pictures, would else be waited for in every step."""

    def __init__(self, work: Generator[Work]) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(1)
        self._wanted = deque[Future[Work | None]]()
        self._first = deque[Work]()

    def fill(self) -> None:
        """Has the thread make what is missing. Call it with time to spare: the thread takes Python's lock."""
        while len(self._wanted) <= ANNOUNCED_AHEAD:
            self._wanted.append(self._thread.submit(next, self._work, None))

    def put_first(self, works: list[Work]) -> None:
        """Has these come before all others."""
        self._first = deque([*works, *self._first])

    def next(self) -> Work | None:
        """The next batch's; None where there is none."""
        if self._first:
            return self._first.popleft()
        self.fill()
        return self._wanted.popleft().result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._work.close()


class Runner:
    """Keeps `queue_depth` batches in a DALI pipeline, and knows which work each one that comes out was. What cannot be
    decoded goes to `mend`, which may give other work for it."""

    def __init__(
        self,
        make_graph: Callable[[], Graph],
        shards: ShardSet,
        work: Generator[Work],
        queue_depth: int,
        mend: Mend = lambda work, found: None,
    ) -> None:
        self._make_graph, self._mend = make_graph, mend
        self._shards, self._ahead = shards, _Ahead(work)
        self._in_dali: deque[Work] = deque()
        self._graph: Graph | None = None
        self._start(queue_depth)

    def _feed(self) -> bool:
        """Hands DALI the next batch; False where there is none."""
        assert self._graph is not None
        work = self._ahead.next()
        if work is None:
            return False
        for name in self._graph.inputs:
            self._graph.pipeline.feed_input(name, work.inputs[name])
        self._in_dali.append(work)
        return True

    def next(self, stream: torch.cuda.Stream | None) -> tuple[Work, tuple[Any, Any]]:
        """The oldest batch's work and outputs, once they are ready (or ordered on `stream`); starts another batch."""
        if self._graph is None:
            raise ValueError("this feed is closed; make another one")
        while True:
            try:
                outputs = self._graph.pipeline.outputs(stream)
                break
            except RuntimeError as error:
                self._mend_oldest(error)
        work = self._in_dali.popleft()
        if self._feed():
            self._graph.pipeline.schedule_run()
            self._ahead.fill()
        return work, outputs

    def _mend_oldest(self, error: RuntimeError) -> None:
        """Starts a new pipeline on the same batches, the oldest one mended; raises and closes where that cannot be.

        A new one, since DALI calls a pipeline that met an error invalid.
        """
        work = self._in_dali[0]
        self._graph = None
        try:
            found = damaged(self._shards, work.ids)
            if not found:
                error.add_note(f"in the batch of epoch {work.epoch}, step {work.step}, whose pictures Pillow decodes")
                raise error
            mended = self._mend(work, found)
            if mended is None:
                raise ValueError(
                    f"{len(found)} of {len(work.ids)} pictures of epoch {work.epoch}, step {work.step} cannot be "
                    f"decoded: {several(list(found.values()))}; {REMEDY}"
                ) from error
        except (RuntimeError, ValueError):
            self.close()
            raise
        self._ahead.put_first([mended, *list(self._in_dali)[1:]])
        self._start(len(self._in_dali))

    def _start(self, batches: int) -> None:
        """Puts the next `batches` into a new pipeline, as many as its queue is deep."""
        self._graph = self._make_graph()
        self._in_dali.clear()
        for _ in range(batches):
            self._feed()
        self._graph.pipeline.schedule_run()  # the first call starts as many as the queue is deep

    def close(self) -> None:
        self._graph = None  # the pipeline goes with its last reference, and stops its threads
        self._ahead.close()
