"""Runs jobs in the caller's process, in local processes or on a Dask cluster. The results are the same in all three.

    with workers_of(2, "pipeline.shards.job") as workers:
        results = list(workers.map(job, arguments))

`Workers` wraps a `concurrent.futures.Executor`, so any executor works. This module imports only the standard library;
Dask is imported when a cluster is used.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
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
from importlib import import_module
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_connections
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")
ProgressCallback = Callable[[int], None]  # called with the number of units finished since the last call

# Jobs submitted per worker. With two, a worker that finishes a job already has the next one, and the arguments and
# results of only a few jobs are in memory at a time.
JOBS_PER_WORKER = 2


@dataclass(frozen=True)
class Workers:
    """A number of workers that run jobs.

    Attributes:
        executor: Runs the jobs; None runs them in the caller's process.
        count: How many jobs run at a time.
    """

    executor: Executor | None
    count: int

    def map(self, job: Callable[..., Result], *arguments: Iterable[Any]) -> Iterator[Result]:
        """Yields the results of `job` in the order of its arguments, like the built-in `map`.

        It ends with the shortest iterable, so some may be endless. If a job raises, its exception is raised here and
        the jobs that have not started are cancelled.
        """
        if self.executor is None:
            yield from map(job, *arguments)
            return
        queue: deque[Future[Result]] = deque()
        try:
            for values in zip(*arguments, strict=False):
                if len(queue) >= JOBS_PER_WORKER * self.count:
                    yield queue.popleft().result()
                with _interrupts_held_back():
                    queue.append(self.executor.submit(job, *values))
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()

    def as_done(self, job: Callable[[Any], Result], arguments: Iterable[Any]) -> Iterator[Result]:
        """Yields the results of `job` in the order in which they finish.

        Arguments are taken from the iterable only when a job can be submitted. Errors are handled as in `map`.
        """
        if self.executor is None:
            yield from map(job, arguments)
            return
        running: set[Future[Result]] = set()
        try:
            for argument in arguments:
                if len(running) >= JOBS_PER_WORKER * self.count:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                with _interrupts_held_back():
                    running.add(self.executor.submit(job, argument))
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in running:
                future.cancel()


IN_PROCESS = Workers(None, 1)


@contextmanager
def workers_of(count: int, *preload: str, engine: str | None = None) -> Iterator[Workers]:
    """Starts workers for the block and stops them after it.

    After KeyboardInterrupt, local processes are stopped in the middle of their jobs. Ctrl-C reaches only the caller.

    Args:
        count: Number of local processes; 1 is the caller's own process. Ignored if `engine` is given.
        preload: Modules that are imported before the first job, once for all local processes.
        engine: Address of a Dask scheduler, `tcp://host:port`.

    Raises:
        OSError: A worker process died.
        ValueError: `count` is below 1, or there is no usable cluster at `engine`.
    """
    if engine is not None:
        with _cluster(engine) as workers:
            yield workers
    elif count < 1:
        raise ValueError(f"{count} workers, expected at least 1")
    elif count == 1:
        import_quickly(*preload)
        yield IN_PROCESS
    else:
        start_fork_server(*preload)
        context = get_context("forkserver")
        # Wait for the imports before there is a pool: after Ctrl-C a late worker would miss the semaphores of its pool.
        first = context.Process(target=ignore, args=(0,))
        first.start()
        first.join()
        caller_lives, held_by_caller = context.Pipe(duplex=False)
        with _interrupts_held_back():
            pool = ProcessPoolExecutor(
                count, mp_context=context, initializer=_end_with_caller, initargs=(caller_lives,)
            )
        try:
            with held_by_caller, pool:
                try:
                    yield Workers(pool, count)
                except KeyboardInterrupt:
                    held_by_caller.close()  # the workers exit, and with them the pool ends
                    raise
        except BrokenExecutor as error:
            raise _worker_died() from error


def start_fork_server(*preload: str) -> None:
    """Starts the process from which workers are forked, if it does not run. It imports `preload` in the background.

    Workers share the memory pages of the preloaded libraries. A plain fork would share them too, but is unsafe because
    the caller has threads. A terminal sends Ctrl-C to all processes. It stays blocked in this process and in the
    workers: they would print a traceback each, and they end with the caller anyway.
    """
    forkserver.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # first, because its start unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Holds back Ctrl-C until the block ends, because KeyboardInterrupt could leave a pool with half a worker."""
    if threading.current_thread() is not threading.main_thread():  # other threads get no KeyboardInterrupt
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received and callable(before):
            before(*received[0])


def import_quickly(*modules: str) -> None:
    """Imports large modules without garbage collection, and keeps their objects out of later collections.

    An import makes no garbage. For torch, the collections at import and at exit would take a third of the time of both.
    """
    if all(module in sys.modules for module in modules):
        return
    enabled = gc.isenabled()
    gc.disable()
    for module in modules:
        import_module(module)
    gc.freeze()
    if enabled:
        gc.enable()


def _end_with_caller(caller_lives: Connection) -> None:
    """Makes this worker exit when the caller does, even if the caller is killed.

    Otherwise a worker would wait for ever, or keep writing to files that the next run writes.
    """

    def exit_after_caller() -> None:
        # Nothing is ever sent. The pipe becomes readable (end of file) when the kernel closes the caller's end.
        wait_for_connections([caller_lives])
        os._exit(1)

    threading.Thread(target=exit_after_caller, daemon=True).start()


@contextmanager
def _cluster(address: str) -> Iterator[Workers]:
    """Connects to a Dask cluster. If one of its workers dies, Dask runs that worker's jobs again on another.

    Each machine of the cluster needs this project, the same environment and the same file paths.
    """
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
            raise ValueError(f"{address}: this cluster has no worker; start one: dask worker {address}")
        try:
            with client.get_executor(pure=False) as executor:  # pure would return one result for equal arguments
                yield Workers(executor, count)
        except KilledWorker as error:
            raise _worker_died() from error


def _worker_died() -> OSError:
    return OSError(
        "a worker died (out of memory?); run the same command again to continue, with fewer workers if needed"
    )


def ignore(n: int) -> None:
    """A `ProgressCallback` that does nothing."""
