"""TODO-DOC model.parallel.mesh (from model.ranks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from model.shapes import TOWERS

RankLayout = Literal["towers", "data"]


@dataclass(frozen=True)
class Place:
    """Where one rank stands in the mesh (data, tower): pure arithmetic.

    Attributes:
        rank: 0 to `world` - 1; the tower is the coordinate that runs fastest.
        world: ranks of the job.
        tower_ranks: ranks that the two towers are spread over: 2, a tower each, or 1, both together.
    """

    rank: int = 0
    world: int = 1
    tower_ranks: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world and self.tower_ranks in (1, len(TOWERS))
        if self.world % self.tower_ranks:
            raise ValueError(
                f"{self.world} ranks are no pairs of towers; start 1 rank or an even number, or choose --layout data"
            )

    @classmethod
    def of(cls, rank: int, world: int, layout: RankLayout = "towers") -> Place:
        """The place of `rank`; one rank holds both towers in either layout."""
        assert layout in get_args(RankLayout)
        return cls(rank, world, len(TOWERS) if layout == "towers" and world > 1 else 1)

    @property
    def data_ranks(self) -> int:
        """Parts that a global batch is trained in."""
        return self.world // self.tower_ranks

    @property
    def data_rank(self) -> int:
        """Which part is this rank's."""
        return self.rank // self.tower_ranks

    @property
    def towers(self) -> tuple[int, ...]:
        """The towers that live here."""
        return TOWERS if self.tower_ranks == 1 else (self.rank % len(TOWERS),)

    @property
    def is_pair(self) -> bool:
        """Whether the other tower lives on another rank, `peer`."""
        return self.tower_ranks > 1

    @property
    def peer(self) -> int:
        """The rank of the other tower."""
        assert self.is_pair
        return self.rank ^ 1

    def first_row(self, batch: int) -> int:
        """The row of a global batch of `batch` with which this rank's part begins."""
        return self.data_rank * (batch // self.data_ranks)
