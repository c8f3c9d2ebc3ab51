"""TODO-DOC model.dropout (from model.alexnet)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.recipe import LAYERS


@dataclass(frozen=True)
class DropoutDraws:
    """Which units fc6 and fc7 keep in one training step: a pure function of seed, step, layer, tower and row.

    A mask is drawn for the whole global batch, and a rank takes its rows; so masks do not depend on the ranks.

    Attributes:
        seed: of the run.
        step: number of the update, over all epochs.
        first_row: row of the global batch that this rank's first image is.
        global_batch: images of the global batch; None where this rank has them all.
    """

    seed: int
    step: int
    first_row: int = 0
    global_batch: int | None = None

    def keep(self, layer: str, tower: int, rows: int, units: int, keep: float, device: torch.device) -> Tensor:
        """Mask (rows, units), bool, of this rank's rows: True, with chance `keep`, where a unit stays."""
        batch = rows if self.global_batch is None else self.global_batch
        if self.first_row + rows > batch:
            raise ValueError(
                f"rows {self.first_row}..{self.first_row + rows} of a batch of {batch}; set first_row and global_batch"
            )
        draw = seeded_generator(device, self.seed, self.step, LAYERS.index(layer), tower)
        chance = torch.rand(batch, units, generator=draw, device=device, dtype=torch.float32)
        return chance[self.first_row : self.first_row + rows] < keep


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose draws depend on all numbers of `key`, and in their order."""
    mixed = 0
    for number in key:
        mixed = splitmix64(mixed ^ (number % 2**64))
    return torch.Generator(device).manual_seed(mixed)


def splitmix64(state: int) -> int:
    """First output of the generator SplitMix64 from `state`: 64 bits in, 64 well mixed bits out, one to one."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return z ^ z >> 31
