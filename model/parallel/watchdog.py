"""Reports which rank hangs, and at which step, and then ends the job.

Ranks that wait for a hanging rank look the same from outside as the rank itself. So every rank counts the marks that
it passes (`Ranks.mark`), which all ranks pass in the same order, and writes its count to the job's store. The rank with
the smallest count is the one that the others wait for. A thread in every rank also counts its own checks; if that count
stops, the whole process is stopped or its machine is down.
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

CHECKS_PER_HANG = 8  # checks of the thread in the time that a rank may stay at one mark


@dataclass(frozen=True)
class Position:
    """How far a rank has come.

    Attributes:
        passed: number of marks passed.
        step: the optimizer step it works on, from 1.
        where: the last mark, such as "waiting for the next batch".
        checks: how often the rank's watchdog thread has run.
    """

    passed: int = 0
    step: int = 0
    where: str = "starting"
    checks: int = 0


def describe_hang(before: dict[int, Position], now: dict[int, Position], hang_s: float) -> str:
    """Says which rank hangs.

    Args:
        before: positions of all ranks at an earlier check.
        now: their positions at a later check, with no progress between the two.
        hang_s: the allowed time, for the message.
    """
    fewest = min(position.passed for position in now.values())
    late = {rank: position for rank, position in now.items() if position.passed == fewest}
    waiting = next((rank for rank in now if rank not in late), None)
    parts = []
    for rank, position in late.items():
        stopped = rank in before and before[rank].checks == position.checks
        sign = "; its process does not respond" if stopped else ""
        parts.append(f"rank {rank} is at step {position.step} ({position.where}{sign})")
    if waiting is None:
        found = f"all ranks wait for each other: {', '.join(parts)}"
    else:
        found = f"{', '.join(parts)}; rank {waiting} waits for it at step {now[waiting].step} ({now[waiting].where})"
    return f"no progress for {hang_s:g} s: {found}"


class Watchdog:
    """A context manager that watches for hangs.

    If this rank passes no mark for `hang_s`, it prints which rank hangs and ends the process with exit code 1.

    Args:
        store: the job's key-value store.
        rank: this rank.
        world: number of ranks.
        hang_s: longest time that one mark may take: a step, a batch or the writing of a checkpoint.
        end: called with the message; by default it prints it and ends the process.
    """

    def __init__(self, store: Store, rank: int, world: int, hang_s: float, end: Callable[[str], None] | None = None):
        # A connection of its own: the main thread may be waiting on the other one. The type stubs lack `clone`.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=max(1.0, hang_s / CHECKS_PER_HANG)))
        self._rank, self._world, self._hang_s = rank, world, hang_s
        self._end = end or _exit
        self._passed, self._step, self._where, self._checks = 0, 0, Position.where, 0
        self._moved_s = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._moved_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()

    def mark(self, where: str, step: int | None = None) -> None:
        """Records that this rank is at `where`. All ranks must call it at the same places in the same order."""
        self._passed += 1
        self._where, self._moved_s = where, time.monotonic()
        if step is not None:
            self._step = step
            self._publish()  # at once: in a process that is stopped, no thread could do it later

    def _watch(self) -> None:
        before: dict[int, Position] = {}
        while not self._done.wait(self._hang_s / CHECKS_PER_HANG):
            self._checks += 1
            try:
                self._publish()
                still_s = time.monotonic() - self._moved_s
                if still_s < self._hang_s / 2:
                    before = {}
                    continue
                now = self._positions()
            except Exception as error:  # the store fails, too, if the rank that hosts it is gone
                if not self._done.is_set() and time.monotonic() - self._moved_s >= self._hang_s:
                    self._end(f"no progress for {self._hang_s:g} s, and the job's store does not respond ({error})")
                continue
            if still_s >= self._hang_s and before:
                self._end(describe_hang(before, now, self._hang_s))
            before = before or now

    def _publish(self) -> None:
        position = Position(self._passed, self._step, self._where, self._checks)
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
    """Ends the process without involving the main thread, which may be blocked for ever in another rank's operation."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
