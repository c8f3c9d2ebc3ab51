"""Shapes of the layers: sizes, counts of weights and units, and which rows of a parameter belong to which tower.

Pure arithmetic from the layout of layers-145.cfg (released source; paper section 3.5). This module does not import
torch at run time, so that command lines can use it without loading torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.recipe import IN_ORDER, LAYERS, SOURCE2012, Recipe, Structure

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIDE = 224  # pixels; paper section 2
IMAGE_CHANNELS = 3  # R, G, B
TOWERS = (0, 1)
POOL_SIZE, POOL_STRIDE = 3, 2  # overlapping windows: paper section 3.4
# Feature maps, or units of a fully connected layer, of one tower: layers-145.cfg; conv6 of CNN*: run 146.
MAPS = {"conv1": 48, "conv2": 128, "conv3": 192, "conv4": 192, "conv5": 128, "conv6": 128, "fc6": 2048, "fc7": 2048}
READ_BOTH = ("conv3", "conv6", "fc6", "fc7", "fc8")
# What differs from `MAPS`. One tower is the "one-GPU net" of paper section 3.2, footnote 2 (run 145-half): its last
# convolution and its hidden fully connected layers are as large as both towers' together. Without communication (run
# 150) towers meet in fc8 only; with its wider fc6, fc6 and fc7 have as many weights as those of two towers.
OTHER_MAPS: dict[Structure, dict[str, int]] = {
    "two-towers": {},
    "one-tower": {"conv5": 256, "conv6": 256, "fc6": 4096, "fc7": 4096},
    "no-communication": {"conv2": 160, "fc6": 4096},
}


@dataclass(frozen=True)
class NetSpec:
    """Size of the network.

    Width 1 is the network of 2012. Other widths scale the feature maps and units of every hidden layer. A unit of a
    narrower network reads fewer feature maps, so its starting weights are larger by the square root of that factor.
    Activations then start as strong as in 2012. Otherwise they fade from layer to layer, and training stays long on
    its first plateau.

    Attributes:
        classes: units of fc8.
        width: factor on the size of the hidden layers.

    Raises:
        ValueError: if `classes` is below 1 or `width` is not a positive number.
    """

    classes: int = 1000
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"{self.classes} classes, expected at least 1")
        if not 0 < self.width < math.inf:
            raise ValueError(f"width {self.width}, expected a positive number; 1.0 is the network of 2012")

    def scaled(self, channels: int) -> int:
        """`channels` of one tower at this width: a multiple of 4, at least 4."""
        return max(4, 4 * round(channels * self.width / 4))


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer over all its towers.

    A fully connected layer counts as a convolution whose kernel is as large as the feature maps that it reads.

    Attributes:
        name: one of `model.recipe.ALL_LAYERS`.
        kernel: side of the square kernel, in pixels.
        stride: step between two outputs, in pixels.
        pad: zeros on each side of the input.
        in_channels: feature maps that one unit reads, of one tower or of both.
        in_side: rows (and columns) of those feature maps.
        out_channels: feature maps (or units of a fully connected layer) of one tower.
        towers: the towers that have this layer; fc8, and a network of one tower, is on tower 0 only.
        reads_both: whether the layer reads both towers. Ranks that hold one tower exchange activations before it.
    """

    name: str
    kernel: int
    stride: int
    pad: int
    in_channels: int
    in_side: int
    out_channels: int
    towers: tuple[int, ...]
    reads_both: bool

    @property
    def out_side(self) -> int:
        """Rows of an output feature map. Rounded up: the last window may reach past the image (layer.py:1004)."""
        return _out_side(self.in_side + 2 * self.pad, self.kernel, self.stride)

    @property
    def overhang(self) -> int:
        """Pixels by which the last window reaches past the padded input; they count as 0."""
        return (self.out_side - 1) * self.stride + self.kernel - self.in_side - 2 * self.pad

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.biases * self.in_channels * self.kernel**2

    @property
    def biases(self) -> int:
        """Number of biases: one for each feature map."""
        return len(self.towers) * self.out_channels

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations (multiplications with a weight) for one image."""
        return self.weights * self.out_side**2

    @property
    def units(self) -> int:
        """Number of outputs, before pooling."""
        return self.biases * self.out_side**2


def _out_side(side: int, window: int, stride: int) -> int:
    return 1 + math.ceil((side - window) / stride)


def layer_table(spec: NetSpec, recipe: Recipe = SOURCE2012) -> tuple[LayerShape, ...]:
    """Shapes of all layers, computed from the image onwards. The recipe says which layers there are and which are
    pooled. Where the recipe leaves out a layer that reads both towers, the layer behind it does."""
    table: list[LayerShape] = []
    channels, side, reads_both = IMAGE_CHANNELS, IMAGE_SIDE, False
    held = {layer.name: layer for layer in recipe.layers}
    for name in IN_ORDER:
        reads_both |= _reads_both(name, recipe.structure)
        if name not in held:
            continue
        kernel, stride, pad = _window(name, side)
        out_channels = spec.classes if name == "fc8" else spec.scaled((MAPS | OTHER_MAPS[recipe.structure])[name])
        towers = TOWERS[:1] if name == "fc8" or recipe.structure == "one-tower" else TOWERS
        in_channels = channels * len(TOWERS) if reads_both else channels
        table.append(LayerShape(name, kernel, stride, pad, in_channels, side, out_channels, towers, reads_both))
        channels, side, reads_both = out_channels, table[-1].out_side, False
        for operation in held[name].after:
            if operation == "pool":
                side = _out_side(side, POOL_SIZE, POOL_STRIDE)
            elif operation == "pool_2x2":
                side //= 2
    return tuple(table)


def _reads_both(name: str, structure: Structure) -> bool:
    return {"two-towers": name in READ_BOTH, "no-communication": name == "fc8", "one-tower": False}[structure]


def _window(name: str, side: int) -> tuple[int, int, int]:
    """Kernel, stride and pad of a layer that reads feature maps of `side` pixels: layers-145.cfg."""
    if name.startswith("fc"):
        return side, 1, 0
    return {"conv1": (11, 4, 0), "conv2": (5, 1, 2)}.get(name, (3, 1, 1))


def format_table(spec: NetSpec, recipe: Recipe = SOURCE2012) -> str:
    """The layer table as Markdown, with a line of totals."""
    head = ("layer", "reads", "feature maps per tower", "kernel", "output", "weights", "biases", "MACs", "units")
    rows: list[tuple[str, ...]] = [head]
    table = layer_table(spec, recipe)
    for s in table:
        reads = "image" if s.name == LAYERS[0] else "both towers" if s.reads_both else "own tower"
        channels = f"{s.out_channels}" if s.towers == TOWERS else f"{s.out_channels} on tower 0"
        kernel = f"{s.kernel}, stride {s.stride}, pad {s.pad}" if s.name.startswith("conv") else "-"
        output = f"{s.out_side} x {s.out_side}" if s.out_side > 1 else "1"
        counts = (f"{n:,}" for n in (s.weights, s.biases, s.macs, s.units))
        rows.append((s.name, reads, channels, kernel, output, *counts))
    totals = (sum(getattr(s, field) for s in table) for field in ("weights", "biases", "macs", "units"))
    rows.append(("all", "", "", "", "", *(f"{n:,}" for n in totals)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---|---|---|---|--:|--:|--:|--:|")
    return "\n".join(lines)


def towers_of(name: str) -> tuple[int, ...]:
    """The towers that hold rows of the parameter called `name`; fc8 is on tower 0 only."""
    return TOWERS[:1] if name.startswith("fc8.") else TOWERS


def tower_rows(name: str, rows: int, towers: tuple[int, ...]) -> slice:
    """Which rows of a parameter a rank holds.

    Args:
        name: the parameter, as "conv1.weight".
        rows: rows of the whole parameter, of both towers together.
        towers: the towers that the rank holds.

    Returns:
        A slice of dimension 0; empty if the rank holds no row.
    """
    held = [tower for tower in towers_of(name) if tower in towers]
    rows_per_tower = rows // len(towers_of(name))
    return slice(rows_per_tower * min(held, default=0), rows_per_tower * (max(held, default=-1) + 1))


def tower_slice(name: str, whole: Tensor, tower: int) -> Tensor:
    """Rows of one tower in the parameter (or velocity) called `name` of a network with both towers.

    The slices of towers 0 and 1, concatenated along dimension 0, are `whole` again. All of fc8 belongs to tower 0; its
    slice for tower 1, whose network has no fc8, is empty.
    """
    return whole[tower_rows(name, len(whole), (tower,))]
