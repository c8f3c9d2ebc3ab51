"""TODO-DOC model.shapes (from model.alexnet)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from model.recipe import LAYERS, SOURCE2012, Recipe

IMAGE_SIDE = 224  # pixels; P 2
IMAGE_MAPS = 3  # R, G, B
TOWERS = (0, 1)
POOL_SIZE, POOL_STRIDE = 3, 2  # overlapping: P 3.4


@dataclass(frozen=True)
class NetSpec:
    """Size of the network. Width 1 is 2012's; other widths scale maps and units of every hidden layer.

    A unit of a narrower network reads fewer maps; its weights start larger by the square root of that, so that
    responses start as strong as 2012's. Else they fade from layer to layer, and training stays long on its plateau.

    ValueError where `classes` is not at least 1 or `width` not above 0.
    """

    classes: int = 1000
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"{self.classes} classes; a network needs at least 1")
        if not 0 < self.width < math.inf:
            raise ValueError(f"width {self.width} is not a positive number; 1.0 is the network of 2012")

    def scaled(self, maps: int) -> int:
        """`maps` of one tower at this width: a multiple of 4, at least 4."""
        return max(4, 4 * round(maps * self.width / 4))


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer over all its towers. A fully connected layer is a kernel as large as the maps it reads.

    Attributes:
        name: one of `LAYERS`.
        kernel: side of the square kernel.
        stride: step between two outputs, in pixels.
        pad: zeros around the input.
        in_maps: maps that one unit reads, of one tower or of both.
        in_side: rows (and columns) of those maps.
        maps: output maps, or units, of one tower.
        towers: the towers that have this layer; fc8 is on tower 0 alone.
        reads_both: whether it reads both towers; before it, ranks that hold one tower exchange activations.
    """

    name: str
    kernel: int
    stride: int
    pad: int
    in_maps: int
    in_side: int
    maps: int
    towers: tuple[int, ...]
    reads_both: bool

    @property
    def out_side(self) -> int:
        """Rows of an output map. Rounded up: the last window may reach past the image (layer.py:1004)."""
        return _out_side(self.in_side + 2 * self.pad, self.kernel, self.stride)

    @property
    def overhang(self) -> int:
        """Pixels by which the last window reaches past the padded input; they count as 0."""
        return (self.out_side - 1) * self.stride + self.kernel - self.in_side - 2 * self.pad

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.biases * self.in_maps * self.kernel**2

    @property
    def biases(self) -> int:
        """Number of biases; a map shares one."""
        return len(self.towers) * self.maps

    @property
    def macs(self) -> int:
        """Multiplications with a weight, for one image."""
        return self.weights * self.out_side**2

    @property
    def units(self) -> int:
        """Number of outputs, before pooling."""
        return self.biases * self.out_side**2


def _out_side(side: int, window: int, stride: int) -> int:
    return 1 + math.ceil((side - window) / stride)


def layer_table(spec: NetSpec, recipe: Recipe = SOURCE2012) -> tuple[LayerShape, ...]:
    """Shapes of all layers, computed from the image onwards; the recipe says which layers are pooled."""
    fixed = (  # kernel (None: the whole input), stride, pad, maps of one tower, reads both: layers-145.cfg
        (11, 4, 0, spec.scaled(48), False),
        (5, 1, 2, spec.scaled(128), False),
        (3, 1, 1, spec.scaled(192), True),
        (3, 1, 1, spec.scaled(192), False),
        (3, 1, 1, spec.scaled(128), False),
        (None, 1, 0, spec.scaled(2048), True),
        (None, 1, 0, spec.scaled(2048), True),
        (None, 1, 0, spec.classes, True),
    )
    table: list[LayerShape] = []
    maps, side = IMAGE_MAPS, IMAGE_SIDE
    for name, (kernel, stride, pad, out_maps, reads_both) in zip(LAYERS, fixed, strict=True):
        in_maps = maps * len(TOWERS) if reads_both else maps
        towers = TOWERS[:1] if name == "fc8" else TOWERS
        shape = LayerShape(name, kernel or side, stride, pad, in_maps, side, out_maps, towers, reads_both)
        table.append(shape)
        maps, side = out_maps, shape.out_side
        if "pool" in recipe.layer(name).after:
            side = _out_side(side, POOL_SIZE, POOL_STRIDE)
    return tuple(table)


def format_table(spec: NetSpec, recipe: Recipe = SOURCE2012) -> str:
    """The layer table as Markdown, with a line of totals."""
    head = ("layer", "reads", "maps per tower", "kernel", "output", "weights", "biases", "MACs", "units")
    rows: list[tuple[str, ...]] = [head]
    table = layer_table(spec, recipe)
    for s in table:
        reads = "image" if s.name == LAYERS[0] else "both towers" if s.reads_both else "own tower"
        maps = f"{s.maps}" if s.towers == TOWERS else f"{s.maps} on tower 0"
        kernel = f"{s.kernel}, stride {s.stride}, pad {s.pad}" if s.name.startswith("conv") else "-"
        output = f"{s.out_side} x {s.out_side}" if s.out_side > 1 else "1"
        counts = (f"{n:,}" for n in (s.weights, s.biases, s.macs, s.units))
        rows.append((s.name, reads, maps, kernel, output, *counts))
    totals = (sum(getattr(s, what) for s in table) for what in ("weights", "biases", "macs", "units"))
    rows.append(("all", "", "", "", "", *(f"{n:,}" for n in totals)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---|---|---|---|--:|--:|--:|--:|")
    return "\n".join(lines)


def towers_of(name: str) -> tuple[int, ...]:
    """The towers that the parameter called `name` has rows of; fc8 is whole on tower 0."""
    return TOWERS[:1] if name.startswith("fc8.") else TOWERS


def tower_rows(name: str, rows: int, towers: tuple[int, ...]) -> slice:
    """Which of the `rows` of the whole parameter `name` a rank that holds `towers` has; none is an empty slice."""
    held = [tower for tower in towers_of(name) if tower in towers]
    each = rows // len(towers_of(name))
    return slice(each * min(held, default=0), each * (max(held, default=-1) + 1))


def tower_slice(name: str, whole: Tensor, tower: int) -> Tensor:
    """Rows of tower `tower` in `whole`, the parameter (or velocity) called `name` of a network with both towers.

    The pieces of towers 0 and 1, one after the other along dimension 0, are `whole` again. fc8 is whole on tower 0,
    and a piece of no rows on tower 1, whose network does not have it.
    """
    return whole[tower_rows(name, len(whole), (tower,))]
