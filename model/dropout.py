"""Dropout masks that do not depend on the number of ranks, and the seeded generators behind them.

A mask is a pure function of (seed, optimizer step, layer, tower, row of the global batch). So a run gives the same
numbers on one rank and on several, and a resumed run needs no saved generator state. `model.alexnet` applies the masks.

The CPU draws masks with torch's generator. Other devices draw them with SplitMix64, from a key that lies in the
device's memory: a step that was recorded once then draws new masks whenever the key changes, and all models of GPUs
draw the same ones (torch's own generator there depends on the number of processors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.recipe import ALL_LAYERS, Recipe
from model.shapes import TOWERS

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # constants of SplitMix64


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
        keys: by layer, the keys of both towers' masks, (2,) int64 on the device; None to make them from seed and step.
            `fill_keys` fills them.
    """

    seed: int
    step: int
    first_row: int = 0
    global_batch: int | None = None
    keys: Mapping[str, Tensor] | None = field(default=None, compare=False)

    def masks(
        self, layer: str, towers: tuple[int, ...], rows: int, units: int, keep: float, device: torch.device
    ) -> Tensor:
        """Masks of this rank's rows for several towers, (rows, T * units), bool; arguments are those of `keep`."""
        if self.keys is None and device.type == "cpu":
            return torch.cat([self.keep(layer, tower, rows, units, keep, device) for tower in towers], dim=1)
        self._check(rows)
        if self.keys is not None:
            both = self.keys[layer]
        else:
            both = torch.empty(len(TOWERS), dtype=torch.int64, device=device)
            self.fill_keys({layer: both})
        keys = both[towers[0] : towers[-1] + 1]
        return keyed_masks(keys, self.first_row, rows, units, keep).view(rows, len(towers) * units)

    def fill_keys(self, keys: Mapping[str, Tensor]) -> None:
        """Writes the keys of this step into tensors like `keys`. The host does not wait: a number is an argument of the
        kernel that writes it, and no memory is copied."""
        for layer, both in keys.items():
            for key, tower in zip(both, TOWERS, strict=True):
                key.fill_(_signed(mixed(self.seed, self.step, ALL_LAYERS.index(layer), tower)))

    def keep(self, layer: str, tower: int, rows: int, units: int, keep: float, device: torch.device) -> Tensor:
        """Mask of this rank's rows for one tower.

        Args:
            layer: name of the layer.
            tower: 0 or 1.
            rows: images of this rank.
            units: units of one tower in this layer.
            keep: probability that a unit is kept.
            device: where the mask is drawn, by torch's generator of this device.

        Returns:
            (rows, units), bool: True for units that are kept.

        Raises:
            ValueError: if the rows reach past the global batch.
        """
        batch = self._check(rows)
        generator = seeded_generator(device, self.seed, self.step, ALL_LAYERS.index(layer), tower)
        uniform = torch.rand(batch, units, generator=generator, device=device, dtype=torch.float32)
        return uniform[self.first_row : self.first_row + rows] < keep

    def _check(self, rows: int) -> int:
        """Images of the global batch. Raises ValueError if `rows` reach past it."""
        batch = rows if self.global_batch is None else self.global_batch
        if self.first_row + rows > batch:
            raise ValueError(
                f"rows {self.first_row}..{self.first_row + rows} of a batch of {batch}; set first_row and global_batch"
            )
        return batch


def empty_keys(recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    """Memory for the keys of all masks that the recipe's network draws."""
    layers = [layer.name for layer in recipe.layers if "dropout" in layer.after]
    return {layer: torch.empty(len(TOWERS), dtype=torch.int64, device=device) for layer in layers}


def keyed_masks(keys: Tensor, first_row: int, rows: int, units: int, keep: float) -> Tensor:
    """Masks (rows, T, units), bool: for each key the numbers of SplitMix64 that starts from it, one for each unit, row
    by row of the global batch. A unit is kept if its number, taken as a signed fraction of 2^64, is below a threshold.

    Args:
        keys: (T,) int64.
        first_row: row of the global batch with which the masks begin.
        rows: number of rows.
        units: units in a row.
        keep: probability that a unit is kept.
    """
    first = first_row * units
    unit = torch.arange(first, first + rows * units, device=keys.device).view(rows, 1, units)
    z = (unit * _signed(GOLDEN)).add(keys.view(1, -1, 1) + _signed(GOLDEN))  # int64 wraps around
    z = (z ^ _shifted(z, 30)).mul_(_signed(MIX_1))
    z = (z ^ _shifted(z, 27)).mul_(_signed(MIX_2))
    # SplitMix64 ends with z ^ z >> 31. That changes only the lower 33 bits, which the comparison does not need.
    return z < min(round(keep * 2**64) - 2**63, 2**63 - 1)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """`z` shifted to the right as an unsigned number."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    """The int64 with the bits of a number below 2^64."""
    return number - 2**64 if number >= 2**63 else number


def mixed(*key: int) -> int:
    """64 bits that depend on every number of `key` and on their order."""
    found = 0
    for number in key:
        found = splitmix64(found ^ (number % 2**64))
    return found


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose draws depend on every number of `key` and on their order."""
    return torch.Generator(device).manual_seed(mixed(*key))


def splitmix64(state: int) -> int:
    """First output of the SplitMix64 generator from `state`: a one-to-one map from 64 bits to 64 well-mixed bits."""
    z = (state + GOLDEN) % 2**64
    z = ((z ^ z >> 30) * MIX_1) % 2**64
    z = ((z ^ z >> 27) * MIX_2) % 2**64
    return z ^ z >> 31
