"""Says which rank hangs, and at which step, and ends the job: a thread in every rank, and words in the job's store.

Ranks that wait for one that hangs look alike from outside. So each rank counts the places it passes, all of them in
the same order, and tells the store its count; who has the smallest count is the one the others wait for. One whose
thread has fallen silent too was stopped, or its machine is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType

from torch.distributed.distributed_c10d import Store

LOOKS = 8  # of the thread, in the time that a rank may stand still


@dataclass(frozen=True)
class Position:
    """How far a rank has come: places passed, the step, the last place, and how often its thread has looked."""

    passed: int = 0
    step: int = 0
    where: str = "the start"
    looks: int = 0


def verdict(before: dict[int, Position], now: dict[int, Position], hang_s: float) -> str:
    """Who hangs, in words, from the positions of all ranks at two looks while nothing moves."""
    behind = min(position.passed for position in now.values())
    late = {rank: position for rank, position in now.items() if position.passed == behind}
    first = next(rank for rank in now if rank not in late) if len(late) < len(now) else None
    words = []
    for rank, position in late.items():
        silent = rank in before and before[rank].looks == position.looks
        sign = ", and its process gives no sign of life" if silent else ""
        words.append(f"rank {rank} is at step {position.step}, {position.where}{sign}")
    if first is None:
        told = f"every rank waits for another: {'; '.join(words)}"
    else:
        others = f"rank {first} waits at step {now[first].step}, {now[first].where}"
        told = f"{'; '.join(words)}; {others}"
    return f"nothing has moved for {hang_s:g} s: {told}"


class Watchdog:
    """Watches from `with` on. Where this rank has not passed a place for `hang_s`, it says who hangs and exits with 1.

    Args:
        store: of the job.
        rank: this one.
        world: all of them.
        hang_s: how long a place may take: the longest step, batch or write of a checkpoint.
        end: ends this process, given the message.
    """

    def __init__(self, store: Store, rank: int, world: int, hang_s: float, end: Callable[[str], None] | None = None):
        # A connection of its own, since the main thread may be waiting on the other. Stubs do not know `clone`.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=max(1.0, hang_s / LOOKS)))
        self._rank, self._world, self._hang_s = rank, world, hang_s
        self._end = end or _exit
        self._passed, self._step, self._where, self._looks = 0, 0, Position.where, 0
        self._moved_s = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self._moved_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()

    def mark(self, where: str, step: int | None = None) -> None:
        """This rank has come to `where`; all ranks call it at the same places in the same order."""
        self._passed += 1
        self._where, self._moved_s = where, time.monotonic()
        if step is not None:
            self._step = step
            self._tell()  # at once: a process that is stopped has no thread that could tell it later

    def _look(self) -> None:
        before: dict[int, Position] = {}
        while not self._done.wait(self._hang_s / LOOKS):
            self._looks += 1
            try:
                self._tell()
                still_s = time.monotonic() - self._moved_s
                if still_s < self._hang_s / 2:
                    before = {}
                    continue
                now = self._positions()
            except Exception as error:  # the store is part of what may be gone
                if not self._done.is_set() and time.monotonic() - self._moved_s >= self._hang_s:
                    self._end(f"nothing has moved for {self._hang_s:g} s, and the job's store is gone ({error})")
                continue
            if still_s >= self._hang_s and before:
                self._end(verdict(before, now, self._hang_s))
            before = before or now

    def _tell(self) -> None:
        position = Position(self._passed, self._step, self._where, self._looks)
        self._store.set(_key(self._rank), json.dumps(asdict(position)))

    def _positions(self) -> dict[int, Position]:
        keys = {rank: _key(rank) for rank in range(self._world)}
        return {
            rank: Position(**json.loads(self._store.get(key))) if self._store.check([key]) else Position()
            for rank, key in keys.items()
        }


def _key(rank: int) -> str:
    return f"watch/{rank}"


def _exit(message: str) -> None:
    """Without a word to the main thread, which may wait for ever."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
