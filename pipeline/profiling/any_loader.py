"""Any iterable of batches, as what the windows measure: an endless iterator, with the size of every batch.

Nothing here imports torch or another library of loaders: what the loader brings is enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from statistics import fmean
from typing import Any, Generic, TypeVar, cast

import psutil

B = TypeVar("B")
UNSIZED = (str, bytes, bytearray)


def images_of(batch: object) -> int:
    """The number of images in a batch: the length of the first array, tensor or list in it.

    Of (images, labels), of {"image": ..., "label": ...} and of a dataclass it is the length of the first entry. A list
    of images that are no arrays has its own length.

    Raises:
        ValueError: the batch has no such part.
    """
    found = _length(batch)
    if found is None:
        raise ValueError(
            f"a batch is a {type(batch).__name__} without an array, tensor or list, so its images cannot be counted; "
            "name their number (--batch N, or batch=N in Python)"
        )
    return found


def _length(value: object) -> int | None:
    """The length of the first array, tensor or list in a value; None if there is none."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    if isinstance(value, UNSIZED):
        return None
    if isinstance(value, Mapping):
        parts: Iterable[object] = value.values()
    elif is_dataclass(value):
        parts = (getattr(value, field.name) for field in fields(value))
    elif isinstance(value, (tuple, list)):
        parts = value
    else:
        return None
    lengths = (length for part in parts if (length := _length(part)) is not None)
    own = len(value) if isinstance(value, (tuple, list)) and len(value) else None
    return next(lengths, own)


class EndlessLoader(Generic[B]):
    """The batches of a loader without end: after the last one the next epoch starts.

    Args:
        loader: gives batches: an iterable, or a function that makes one. It is called again only if what it made cannot
            start again.
        clock: gives the time in seconds.

    Attributes:
        source: the iterable of the present epoch.
        epochs_batches: number of batches of each epoch that has ended.
        restarts_s: for each of these, the seconds from its end until the first batch of the next one is there.

    Raises:
        ValueError: it is neither, or gives no batch, or ends and cannot start again.
    """

    def __init__(
        self, loader: Iterable[B] | Callable[[], Iterable[B]], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._loader, self._clock = loader, clock
        self.epochs_batches, self.restarts_s = list[int](), list[float]()
        self.source = self._made()
        self._batches, self._taken = iter(self.source), 0

    def _made(self) -> Iterable[B]:
        made = self._loader
        if not isinstance(made, Iterable) and callable(made):
            made = made()
        if not isinstance(made, Iterable):
            raise ValueError(f"it is a {type(made).__name__}; expected something to iterate over, which gives batches")
        return made

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        began_s = self._clock()
        try:
            batch = next(self._batches)
        except StopIteration:
            batch = self._first_of_next_epoch()
            self.restarts_s.append(self._clock() - began_s)
        self._taken += 1
        return batch

    def _first_of_next_epoch(self) -> B:
        if not self._taken:
            raise ValueError("it gives no batch at all") from None
        self.epochs_batches.append(self._taken)
        self._taken = 0
        if self.source is not self._loader and iter(self.source) is self.source:  # an iterator, which is used up
            self.source = self._made()
        self._batches = iter(self.source)
        try:
            return next(self._batches)
        except StopIteration:
            ended = f"it ended after {self.epochs_batches[-1]} batches and cannot start again"
            raise ValueError(f"{ended}; pass a function that makes it") from None

    def few(self, number: int) -> list[B]:
        """The next batches."""
        return list(islice(self, number))

    def restart_share(self, batch_s: float) -> float:
        """Share of the loader's time, 0 to 1, that restarts add to its epochs; 0 if no epoch has ended.

        Args:
            batch_s: mean seconds of a batch, restarts included.
        """
        if not self.restarts_s:
            return 0.0
        batches, restart_s = fmean(self.epochs_batches), fmean(self.restarts_s)
        epoch_s = batches * batch_s
        # The first batch itself takes as long as the others, which share the rest of the epoch.
        usual_s = max(0.0, epoch_s - restart_s) / (batches - 1) if batches > 1 else 0.0
        return min(1.0, max(0.0, restart_s - usual_s) / epoch_s)


@dataclass(frozen=True)
class ProcessCpu:
    """CPU time of a process.

    Attributes:
        pid: its number.
        name: its name.
        cpu_s: CPU seconds, user and system.
    """

    pid: int
    name: str
    cpu_s: float


class ChildProcesses:
    """CPU time of the children of this process, from now on."""

    def __init__(self) -> None:
        self._before = {use.pid: use.cpu_s for use in _children()}
        self._ended_s = _ended_children_s()

    def used(self) -> list[ProcessCpu]:
        """The children that have used CPU time since, and what those used that have ended, as process 0."""
        uses = [ProcessCpu(use.pid, use.name, use.cpu_s - self._before.get(use.pid, 0.0)) for use in _children()]
        living = {use.pid for use in uses}
        # The system counts a child's whole time when the child ends, also what it had used before.
        before_s = sum(seconds for pid, seconds in self._before.items() if pid not in living)
        ended_s = max(0.0, _ended_children_s() - self._ended_s - before_s)
        return [use for use in [*uses, ProcessCpu(0, "processes that have ended", ended_s)] if use.cpu_s > 0]


def _children() -> list[ProcessCpu]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
            found.append(ProcessCpu(child.pid, child.name(), times.user + times.system))
        except psutil.Error:
            continue  # it ended after it was listed
    return found


def _ended_children_s() -> float:
    times = cast(Any, psutil.Process().cpu_times())
    return float(times.children_user + times.children_system)
