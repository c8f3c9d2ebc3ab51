"""Work shared out: `workers` processes, or the caller's own for one; results come in the order of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextmanager
def executor_of(workers: int, preload: str) -> Iterator[Executor | None]:
    """`workers` processes that have the module `preload`, or None for one: the caller's own."""
    if workers == 1:
        yield None
        return
    # forkserver: workers share the pages of the libraries, which a fork of this (threaded) process could not do safely
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield pool


def in_order(executor: Executor | None, job: Callable[..., Result], *arguments: Iterable[Any]) -> Iterator[Result]:
    """`map` of `job`, by `executor` if there is one."""
    return map(job, *arguments) if executor is None else executor.map(job, *arguments)


def ignore(n: int) -> None:
    """Progress that nobody watches."""
