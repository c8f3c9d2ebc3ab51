"""Which part of the network and of the batch a rank has: its place in a device mesh (data, tower). Pure arithmetic.

    layout "towers", 4 ranks        tower 0    tower 1
        first half of the batch     rank 0     rank 1       one row is a tower pair
        second half                 rank 2     rank 3

In layout "data" every rank holds both towers, and each takes a part of the batch. One rank holds both towers in either
layout. This module does not import torch at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from model.shapes import TOWERS

RankLayout = Literal["towers", "data"]


@dataclass(frozen=True)
class Place:
    """The place of one rank in the mesh.

    Attributes:
        rank: 0 to `world` - 1. Neighbouring ranks hold different towers.
        world: number of ranks of the job.
        tower_ranks: ranks that the two towers are spread over: 2 if each rank holds one tower, 1 if it holds both.

    Raises:
        ValueError: if the ranks cannot form pairs.
    """

    rank: int = 0
    world: int = 1
    tower_ranks: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world and self.tower_ranks in (1, len(TOWERS))
        if self.world % self.tower_ranks:
            raise ValueError(
                f"{self.world} ranks cannot form tower pairs; start 1 rank or an even number, or choose --layout data"
            )

    @classmethod
    def of(cls, rank: int, world: int, layout: RankLayout = "towers") -> Place:
        """The place of `rank` in a layout."""
        assert layout in get_args(RankLayout)
        return cls(rank, world, len(TOWERS) if layout == "towers" and world > 1 else 1)

    @property
    def data_ranks(self) -> int:
        """Number of parts that a global batch is trained in."""
        return self.world // self.tower_ranks

    @property
    def data_rank(self) -> int:
        """The part of this rank."""
        return self.rank // self.tower_ranks

    @property
    def towers(self) -> tuple[int, ...]:
        """The towers that this rank holds."""
        return TOWERS if self.tower_ranks == 1 else (self.rank % len(TOWERS),)

    @property
    def is_pair(self) -> bool:
        """Whether the other tower is on another rank, `partner`."""
        return self.tower_ranks > 1

    @property
    def partner(self) -> int:
        """The rank that holds the other tower of the pair."""
        assert self.is_pair
        return self.rank ^ 1

    def crosses_nodes(self, node_ranks: int) -> bool:
        """Whether a pair of the job has its ranks on two nodes, if nodes have `node_ranks` consecutive ranks each."""
        return self.is_pair and node_ranks < self.world and node_ranks % self.tower_ranks > 0

    def first_row(self, batch: int) -> int:
        """First row of this rank's part in a global batch of `batch` images."""
        return self.data_rank * (batch // self.data_ranks)
