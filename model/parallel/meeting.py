"""The ranks of a job before they have process groups: they exchange texts through the job's key-value store."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

POLL_S = 0.05  # between two looks into the store
GIVEN_UP = "given up"


class OtherRankEnded(RuntimeError):
    """Another rank will not take part in any further exchange."""


class Meeting:
    """This process among the ranks of a job. `Meeting()` is a single rank.

    Attributes:
        rank: this rank, from 0.
        world: number of ranks.
        store: the job's key-value store; None for a single rank.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Store | None = None) -> None:
        self.rank, self.world, self.store = rank, world, store
        self._exchanges = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchange(self, text: str) -> list[str]:
        """Tells all ranks a text and returns the texts of all, by rank. Every rank must call it.

        It waits without a time limit: a rank may hash a set of a terabyte before it calls.

        Raises:
            RuntimeError: another rank has given up, or the process with the store is gone.
        """
        if self.store is None:
            return [text]
        self._exchanges += 1
        told, read = (f"exchange {self._exchanges}/{what}" for what in ("told", "read"))
        self.store.set(f"{told}/{self.rank}", text)
        found = [self._wait_for(f"{told}/{rank}") for rank in range(self.world)]
        self.store.set(f"{read}/{self.rank}", "")
        if self.first:  # its process may host the store, and must not end before all have read it
            for rank in range(self.world):
                self._wait_for(f"{read}/{rank}")
        return found

    def give_up(self) -> None:
        """Makes the exchanges of all other ranks raise. For a rank that ends with an error of the program."""
        if self.store is not None:
            self.store.set(GIVEN_UP, str(self.rank))

    def _wait_for(self, key: str) -> str:
        assert self.store is not None
        while not self.store.check([key]):
            if self.store.check([GIVEN_UP]):
                raise OtherRankEnded
            time.sleep(POLL_S)
        return self.store.get(key).decode()


def meet(timeout_s: float) -> Meeting:
    """Finds the other ranks; torchrun sets their number and address in the environment. Without it, this rank is alone.

    Raises:
        ValueError: the others do not come within `timeout_s`, or the environment names no possible place among them.
    """
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if world == 1:
        return Meeting()
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank}, WORLD_SIZE={world}: expected a RANK from 0 to WORLD_SIZE - 1")
    try:
        found, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"rank {rank} of {world} did not meet the others at {place} within {timeout_s:g} s; "
            "start all ranks, with one MASTER_ADDR and MASTER_PORT that all of them reach"
        ) from error
    # torchrun keeps its store when it restarts failed ranks. A prefix for each attempt hides the old entries, with
    # which a restarted rank would otherwise connect to processes that no longer exist.
    return Meeting(rank, world, PrefixStore(f"attempt {restarts()}", found))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}={text}: expected a whole number; torchrun sets it")
    return int(text)


def restarts() -> int:
    """How often torchrun has restarted the ranks after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
