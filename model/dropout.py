"""Dropout masks that do not depend on the number of ranks, and the seeded generators behind them.

A mask is a pure function of (seed, optimizer step, layer, tower, row of the global batch). So a run gives the same
numbers on one rank and on several, and a resumed run needs no saved generator state. `model.alexnet` applies the masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.recipe import ALL_LAYERS


@dataclass(frozen=True)
class DropoutDraws:
    """Which units fc6 and fc7 keep in one training step.

    A mask is drawn for the whole global batch, and a rank takes its rows. Drawing more than the rank needs costs
    little, and it makes the masks independent of the ranks.

    Attributes:
        seed: seed of the run.
        step: optimizer steps taken before this one, over all epochs.
        first_row: row of the global batch that this rank's first image has.
        global_batch: images of the global batch; None if this rank has them all.
    """

    seed: int
    step: int
    first_row: int = 0
    global_batch: int | None = None

    def keep(self, layer: str, tower: int, rows: int, units: int, keep: float, device: torch.device) -> Tensor:
        """Mask of this rank's rows.

        Args:
            layer: name of the layer.
            tower: 0 or 1.
            rows: images of this rank.
            units: units of one tower in this layer.
            keep: probability that a unit is kept.
            device: where the mask is drawn. CPU and GPU generators draw different numbers from one seed.

        Returns:
            (rows, units), bool: True for units that are kept.

        Raises:
            ValueError: if the rows reach past the global batch.
        """
        batch = rows if self.global_batch is None else self.global_batch
        if self.first_row + rows > batch:
            raise ValueError(
                f"rows {self.first_row}..{self.first_row + rows} of a batch of {batch}; set first_row and global_batch"
            )
        generator = seeded_generator(device, self.seed, self.step, ALL_LAYERS.index(layer), tower)
        uniform = torch.rand(batch, units, generator=generator, device=device, dtype=torch.float32)
        return uniform[self.first_row : self.first_row + rows] < keep


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose draws depend on every number of `key` and on their order."""
    mixed = 0
    for number in key:
        mixed = splitmix64(mixed ^ (number % 2**64))
    return torch.Generator(device).manual_seed(mixed)


def splitmix64(state: int) -> int:
    """First output of the SplitMix64 generator from `state`: a one-to-one map from 64 bits to 64 well-mixed bits."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return z ^ z >> 31
