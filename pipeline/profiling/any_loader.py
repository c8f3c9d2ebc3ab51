"""Any iterable of batches, as what the windows measure: an endless iterator, with the size of every batch.

Nothing here imports torch or another library of loaders: what the loader brings is enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
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
        if self.source is not self._loader and isinstance(self.source, Iterator):  # it is used up
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

    def restart_share(self, batch_s: float, workers: int = 1) -> float:
        """Share of the loader's time, 0 to 1, that restarts add to its epochs; 0 if no epoch has ended.

        Args:
            batch_s: mean seconds of a batch, restarts included.
            workers: batches that are made at the same time.
        """
        if not self.restarts_s:
            return 0.0
        batches, restart_s = fmean(self.epochs_batches), fmean(self.restarts_s)
        epoch_s = batches * batch_s
        if batches <= workers:  # all are made at once: a restart cannot be told from the work
            return 0.0
        # While the first batch is made, so are those of all other workers; they share the rest of the epoch.
        usual_s = max(0.0, epoch_s - restart_s) / (batches - workers)
        return min(1.0, max(0.0, restart_s - workers * usual_s) / epoch_s)


@dataclass(frozen=True)
class ProcessCpu:
    """CPU time of a process.

    Attributes:
        pid: its number.
        name: its name.
        cpu_s: CPU seconds, user and system.
        delay_s: seconds for which its main thread had to wait for a core; None if the kernel does not say.
    """

    pid: int
    name: str
    cpu_s: float
    delay_s: float | None = None

    def since(self, before: ProcessCpu | None) -> ProcessCpu:
        """What was used since an earlier reading of the same process; None if there was none."""
        if before is None:
            return self
        known = self.delay_s is not None and before.delay_s is not None
        delay_s = (self.delay_s or 0.0) - (before.delay_s or 0.0) if known else None
        return replace(self, cpu_s=self.cpu_s - before.cpu_s, delay_s=delay_s)


class ProcessWatch:
    """CPU time of this process and its children, from now on."""

    def __init__(self) -> None:
        self._own, self._before = _reading(psutil.Process()), {use.pid: use for use in _children()}
        self._ended_s = _ended_children_s()

    def own(self) -> ProcessCpu:
        """What this process has used."""
        return _reading(psutil.Process()).since(self._own)

    def children(self) -> list[ProcessCpu]:
        """The children that have used CPU time, and what those used that have ended, as process 0."""
        uses = [use.since(self._before.get(use.pid)) for use in _children()]
        living = {use.pid for use in uses}
        # The system counts a child's whole time when the child ends, also what it had used before.
        before_s = sum(use.cpu_s for pid, use in self._before.items() if pid not in living)
        ended_s = max(0.0, _ended_children_s() - self._ended_s - before_s)
        return [use for use in [*uses, ProcessCpu(0, "processes that have ended", ended_s)] if use.cpu_s > 0]


def delay_ratio(uses: Iterable[ProcessCpu]) -> float | None:
    """Seconds that processes waited for a core for each of their CPU seconds; None if the kernel does not say."""
    known = [(use.delay_s, use.cpu_s) for use in uses if use.delay_s is not None]
    cpu_s = sum(seconds for _, seconds in known)
    return sum(delay_s for delay_s, _ in known) / cpu_s if cpu_s > 0 else None


def _children() -> list[ProcessCpu]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended after it was listed
            found.append(_reading(child))
    return found


def _reading(process: psutil.Process) -> ProcessCpu:
    times = process.cpu_times()
    delay_s = None
    with suppress(OSError, IndexError, ValueError):  # only Linux counts it: CPU time, waiting time, time slices
        delay_s = int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    return ProcessCpu(process.pid, process.name(), times.user + times.system, delay_s)


def _ended_children_s() -> float:
    times = cast(Any, psutil.Process().cpu_times())
    return float(times.children_user + times.children_system)
