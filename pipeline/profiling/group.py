"""The processes that are measured together: what measurements need to know about ranks, and no more.

Ranks that train together take the same windows and wait for one another at every step, so a measurement must agree on
times and collect figures over all of them. `profiling` does not know how ranks talk; a tool passes a `Group`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Group(Protocol):
    """This process among the ranks of a job. Every rank must make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        ...

    @property
    def world(self) -> int:
        """Number of ranks."""
        ...

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers. It returns when all ranks have called it, so it is a barrier as well."""
        ...

    def gather(self, row: Sequence[float]) -> list[list[float]]:
        """The rows of all ranks in the order of ranks, on every rank. All rows must have the same length."""
        ...


class SingleProcess:
    """The group of a process that is measured by itself."""

    rank = 0
    world = 1

    def largest(self, number: int) -> int:
        """The number itself."""
        return number

    def gather(self, row: Sequence[float]) -> list[list[float]]:
        """The row itself, as the only one."""
        return [list(row)]


SINGLE_PROCESS: Group = SingleProcess()
