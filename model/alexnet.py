"""The network of 2012: layer table, response normalisation, two towers. Maths and shapes; runs where its tensors are.

Takes images (N, 3, 224, 224), float, pixel units 0..255 with the mean subtracted; gives logits (N, classes).
The structure is that of layers-145.cfg (P 3.5); what paper and source disagree about comes from the recipe.

Shapes: N images, this rank's rows of a batch · T towers that this rank holds, 1 or 2 · M maps, or units, of one tower ·
H, W rows and columns of a map. Activations are (N, T*M, H, W) or (N, T*M), towers one after the other. Parameters are
stacked in the same way along dimension 0: `tower_slice` cuts one tower's out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.recipe import LAYERS, SOURCE2012, Norm, Recipe

IMAGE_SIDE = 224  # pixels; P 2
IMAGE_MAPS = 3  # R, G, B
TOWERS = (0, 1)
POOL_SIZE, POOL_STRIDE = 3, 2  # overlapping: P 3.4


@dataclass(frozen=True)
class Arriving:
    """Maps of both towers, of which those of the tower on the other rank are still on their way.

    Attributes:
        own: this rank's maps, (N, M, ...).
        tower: whose they are.
        other: waits for the other tower's maps, (N, M, ...), and gives them.
    """

    own: Tensor
    tower: int
    other: Callable[[], Tensor]


Exchange = Callable[[Tensor, str], Tensor | Arriving]


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


class _ResponseNorm(torch.autograd.Function):
    """x * d^-beta, with d = k + alpha * (sum of x^2 over the window), and its gradient in closed form.

    Forward and backward together take less than half the time that autograd needs through the plain operators.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
        d = _window_sum(x.square(), norm.size, dims).mul_(norm.alpha).add_(norm.k)
        power = d.pow(-norm.beta)
        ctx.save_for_backward(x, d, power)
        ctx.norm, ctx.dims = norm, dims
        return x * power

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d(out_j)/d(x_i) = d_j^-beta [i = j] - 2 alpha beta x_i x_j d_j^(-beta-1) [i in the window of j]."""
        x, d, power = ctx.saved_tensors
        norm: Norm = ctx.norm
        scaled = grads[0] * power
        through_d = _window_sum((scaled * x).div_(d), norm.size, ctx.dims).mul_(x)
        return scaled.sub_(through_d, alpha=2 * norm.alpha * norm.beta), None, None


def _window_sum(x: Tensor, size: int, dims: tuple[int, ...]) -> Tensor:
    """Sum of `x` over a centred window of `size` along each of `dims`, cut off at the ends."""
    for dim in dims:
        length, total = x.shape[dim], x.clone()
        for shift in range(1, min(size // 2, length - 1) + 1):
            kept = length - shift
            total.narrow(dim, shift, kept).add_(x.narrow(dim, 0, kept))
            total.narrow(dim, 0, kept).add_(x.narrow(dim, shift, kept))
        x = total
    return x


def norm_across_maps(x_nchw: Tensor, norm: Norm, towers: int) -> Tensor:
    """Divides each response by those of the maps next to it in its own tower, (N, T*M, H, W) to the same (P 3.3)."""
    n, maps, h, w = x_nchw.shape
    return _respond(x_nchw.view(n, towers, maps // towers, h, w), norm, (-3,)).view(n, maps, h, w)


def norm_within_map(x_nchw: Tensor, norm: Norm) -> Tensor:
    """Divides each response by those around it in its own map: `rnorm` of layers-145.cfg:107-117, not in the paper."""
    return _respond(x_nchw, norm, (-2, -1))


def _respond(x: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares do not fit into half precision
    out: Tensor = _ResponseNorm.apply(wide, norm, dims)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


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
        draw = _generator(device, self.seed, self.step, LAYERS.index(layer), tower)
        chance = torch.rand(batch, units, generator=draw, device=device, dtype=torch.float32)
        return chance[self.first_row : self.first_row + rows] < keep


def _generator(device: torch.device, *key: int) -> torch.Generator:
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


class Layer(nn.Module):
    """One layer with all that follows it up to the next, for the towers of this rank.

    `weight` is (T*M, in_maps, kernel, kernel), or (T*M, inputs) where fully connected; `bias` is (T*M,). Both are drawn
    tower by tower, so one tower's are the same whether or not the rank holds the other.
    """

    def __init__(self, shape: LayerShape, recipe: Recipe, towers: tuple[int, ...], seed: int, weight_sd: float) -> None:
        super().__init__()
        self.shape, self.recipe, self.towers = shape, recipe, towers
        self.settings = recipe.layer(shape.name)
        fan_in = (shape.in_maps, shape.kernel, shape.kernel)
        size = (shape.maps, *fan_in) if shape.name.startswith("conv") else (shape.maps, math.prod(fan_in))
        cpu = torch.device("cpu")  # drawn there, so that the start does not depend on the device
        draws = [_generator(cpu, seed, LAYERS.index(shape.name), tower) for tower in towers]
        weights = [torch.empty(size, device=cpu).normal_(0, weight_sd, generator=draw) for draw in draws]
        self.weight = nn.Parameter(torch.cat(weights))
        self.bias = nn.Parameter(torch.full((len(self.weight),), self.settings.bias))

    def forward(self, x: Tensor | Arriving, draws: DropoutDraws | None) -> Tensor:
        """Responses to `x`, then the steps that the recipe names, in its order."""
        x = self._joined(x) if isinstance(x, Arriving) else self._responses(x, self.weight, self.bias)
        for step in self.settings.after:
            match step:
                case "relu":
                    x = F.relu(x)
                case "pool":
                    x = F.max_pool2d(x, POOL_SIZE, POOL_STRIDE)
                case "norm":
                    x = norm_across_maps(x, self.recipe.norm, len(self.towers))
                case "map_norm":
                    assert self.recipe.map_norm is not None
                    x = norm_within_map(x, self.recipe.map_norm)
                case "dropout":
                    x = self._dropout(x, draws)
        return x

    def _joined(self, x: Arriving) -> Tensor:
        """Responses are sums over the maps: a convolution's to this rank's own are made while the others are on their
        way. Fully connected layers wait: their maps are few, and cutting their many weights took longer (LOG.md)."""
        if self.weight.dim() == 2:
            pair = [x.own, x.other()]
            return self._responses(torch.cat(pair if x.tower == 0 else pair[::-1], dim=1), self.weight, self.bias)
        weights = self.weight.chunk(len(TOWERS), dim=1)
        own = self._responses(x.own, weights[x.tower], self.bias)
        return own + self._responses(x.other(), weights[1 - x.tower], None)

    def _responses(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.dim() == 2:
            return F.linear(x.flatten(1), weight, bias)
        shape = self.shape
        if shape.overhang:
            x = F.pad(x, (0, shape.overhang, 0, shape.overhang))
        towers_apart = x.shape[1] // weight.shape[1]  # 1 where a unit reads all that comes in
        return F.conv2d(x, weight, bias, shape.stride, shape.pad, groups=towers_apart)

    def _dropout(self, x: Tensor, draws: DropoutDraws | None) -> Tensor:
        """Training zeroes units and rescales nothing; at test all stay, times their chance (P 4.2; layer.cu:1126)."""
        keep = self.recipe.dropout_keep
        if not self.training:
            return x * keep
        if draws is None:
            raise ValueError("training needs DropoutDraws(seed, step); call eval() first to test the network")
        masks = [draws.keep(self.shape.name, t, len(x), self.shape.maps, keep, x.device) for t in self.towers]
        return x * torch.cat(masks, dim=1)


def identity(x: Tensor, name: str) -> Tensor:
    """The exchange of a rank that holds both towers: what it has is all there is."""
    return x


class AlexNet(nn.Module):
    """The network, or one tower of it. Each layer is a submodule: parameters are "conv1.weight", "conv1.bias" ...

    Attributes:
        segments: names of this rank's layers, in groups that go by their first layer: conv1, conv3, fc6, fc7, fc8.
            Towers exchange activations between two groups.

    Args:
        spec: size.
        recipe: what follows each layer, and how parameters start.
        towers: the towers that this rank holds: (0, 1), (0,) or (1,). fc8 exists only beside tower 0 (layers-145.cfg).
        seed: of the starting weights.
    """

    def __init__(
        self, spec: NetSpec, recipe: Recipe = SOURCE2012, towers: tuple[int, ...] = TOWERS, seed: int = 0
    ) -> None:
        super().__init__()
        if towers not in (TOWERS, TOWERS[:1], TOWERS[1:]):
            raise ValueError(f"towers {towers}; a rank holds (0, 1), (0,) or (1,)")
        self.spec, self.recipe, self.towers = spec, recipe, towers
        self.segments: dict[str, list[str]] = {}
        for shape, full in zip(layer_table(spec, recipe), layer_table(NetSpec(), recipe), strict=True):
            if shape.reads_both or not self.segments:
                segment = self.segments[shape.name] = []
            held = tuple(tower for tower in towers if tower in shape.towers)
            if held:
                segment.append(shape.name)
                weight_sd = recipe.layer(shape.name).weight_sd * math.sqrt(full.in_maps / shape.in_maps)
                self.add_module(shape.name, Layer(shape, recipe, held, seed, weight_sd))

    def run_segment(self, first: str, x: Tensor | Arriving, draws: DropoutDraws | None = None) -> Tensor:
        """Layers `segments[first]` on `x`: images where `first` is "conv1", else maps of both towers (N, 2*M, ...)."""
        for name in self.segments[first]:
            x = self.get_submodule(name)(x, draws)
        assert isinstance(x, Tensor)
        return x

    def forward(self, images_nchw: Tensor, draws: DropoutDraws | None = None, exchange: Exchange = identity) -> Tensor:
        """Logits (N, classes) of images (N, 3, 224, 224), 0..255 with the mean subtracted.

        Args:
            images_nchw: this rank's rows of the batch.
            draws: dropout masks of this step; only training needs them.
            exchange: takes this rank's maps and the name of the layer that reads both towers; gives the maps of both,
                in tower order along dimension 1, or those that are `Arriving`. Called before conv3, fc6, fc7 and fc8.

        Where tower 0 is not held there is no fc8, and the result is what the exchange before it gave.
        """
        if images_nchw.shape[1:] != (IMAGE_MAPS, IMAGE_SIDE, IMAGE_SIDE):
            raise ValueError(
                f"images {tuple(images_nchw.shape)}; expected (N, {IMAGE_MAPS}, {IMAGE_SIDE}, {IMAGE_SIDE})"
            )
        x = self.run_segment("conv1", images_nchw, draws)
        for first in list(self.segments)[1:]:
            x = self.run_segment(first, exchange(x, first), draws)
        return x
