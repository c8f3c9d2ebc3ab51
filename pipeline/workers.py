"""Who does the work: the caller's own process, processes of this machine, or a Dask cluster; all give the same results.

    with workers_of(2, preload="pipeline.shards.job") as workers:
        results = list(workers.map(job, arguments))

Whatever follows `concurrent.futures.Executor` can do it; there is no engine of our own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

Result = TypeVar("Result")
QUEUED = 2  # jobs a worker has ahead: none waits for its next one, and what jobs carry does not pile up


@dataclass(frozen=True)
class Workers:
    """`count` workers behind `executor`; None is the caller's own process."""

    executor: Executor | None
    count: int

    def map(self, job: Callable[..., Result], *arguments: Iterable[Any]) -> Iterator[Result]:
        """Results of `job` in the order of its arguments."""
        if self.executor is None:
            yield from map(job, *arguments)
            return
        queue: deque[Future[Result]] = deque()
        try:
            for values in zip(*arguments, strict=False):  # some may be endless
                if len(queue) >= QUEUED * self.count:
                    yield queue.popleft().result()
                queue.append(self.executor.submit(job, *values))
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()

    def as_done(self, job: Callable[[Any], Result], arguments: Iterable[Any]) -> Iterator[Result]:
        """Results of `job` as they come, whichever is first; arguments are taken when there is room for them."""
        if self.executor is None:
            yield from map(job, arguments)
            return
        running: set[Future[Result]] = set()
        try:
            for argument in arguments:
                if len(running) >= QUEUED * self.count:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                running.add(self.executor.submit(job, argument))
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in running:
                future.cancel()


IN_PROCESS = Workers(None, 1)


@contextmanager
def workers_of(count: int, preload: str, engine: str | None = None) -> Iterator[Workers]:
    """`count` processes that have the module `preload`, for one the caller's own; or the Dask cluster at `engine`.

    Raises OSError where a worker died, ValueError where there is no such cluster.
    """
    if engine is not None:
        with _cluster(engine) as workers:
            yield workers
    elif count == 1:
        yield IN_PROCESS
    else:
        # forkserver: workers share the pages of libraries, which a fork of this (threaded) process could not do safely
        context = get_context("forkserver")
        context.set_forkserver_preload([preload])
        caller_ends, held_by_caller = context.Pipe(duplex=False)
        try:
            with (
                held_by_caller,
                ProcessPoolExecutor(count, mp_context=context, initializer=_watch, initargs=(caller_ends,)) as pool,
            ):
                yield Workers(pool, count)
        except BrokenExecutor as error:
            raise _died() from error


def _watch(caller_ends: Connection) -> None:
    """Ends this worker as soon as the caller has: one that outlived a killed run would wait for ever, or go on writing
    where the next run writes."""

    def wait_for_end() -> None:
        wait_for([caller_ends])  # nothing is ever sent: it is ready when nobody holds the other end any more
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


@contextmanager
def _cluster(address: str) -> Iterator[Workers]:
    """A Dask cluster: its machines need this project, its environment and the same paths. It does a job again whose
    worker died."""
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ValueError(f"{address}: a cluster needs Dask; run: pip install 'alexnet-pipeline[dask]'") from error
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise ValueError(f"{address}: no Dask scheduler there ({error}); start one: dask scheduler") from error
    with client:
        count = len(client.scheduler_info(n_workers=-1)["workers"])
        if count == 0:
            raise ValueError(f"{address}: this cluster has no worker; start some: dask worker {address}")
        try:
            with client.get_executor(pure=False) as executor:
                yield Workers(executor, count)
        except KilledWorker as error:
            raise _died() from error


def _died() -> OSError:
    return OSError("a worker died (out of memory?); run the same command again, which goes on where this one stopped")


def ignore(n: int) -> None:
    """Progress that nobody watches."""


Progress = Callable[[int], None]
