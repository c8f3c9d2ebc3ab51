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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dropout import DropoutDraws, seeded_generator
from model.recipe import LAYERS, SOURCE2012, Recipe
from model.response_norm import norm_across_maps, norm_within_map
from model.shapes import IMAGE_MAPS, IMAGE_SIDE, POOL_SIZE, POOL_STRIDE, TOWERS, LayerShape, NetSpec, layer_table


@dataclass(frozen=True)
class PendingActivations:
    """Maps of both towers, of which those of the tower on the other rank are still on their way.

    Attributes:
        own: this rank's maps, (N, M, ...).
        tower: whose they are.
        other: waits for the other tower's maps, (N, M, ...), and gives them.
    """

    own: Tensor
    tower: int
    other: Callable[[], Tensor]


Exchange = Callable[[Tensor, str], Tensor | PendingActivations]


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
        draws = [seeded_generator(cpu, seed, LAYERS.index(shape.name), tower) for tower in towers]
        weights = [torch.empty(size, device=cpu).normal_(0, weight_sd, generator=draw) for draw in draws]
        self.weight = nn.Parameter(torch.cat(weights))
        self.bias = nn.Parameter(torch.full((len(self.weight),), self.settings.bias))

    def forward(self, x: Tensor | PendingActivations, draws: DropoutDraws | None) -> Tensor:
        """Responses to `x`, then the steps that the recipe names, in its order."""
        x = self._joined(x) if isinstance(x, PendingActivations) else self._responses(x, self.weight, self.bias)
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

    def _joined(self, x: PendingActivations) -> Tensor:
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

    def run_segment(self, first: str, x: Tensor | PendingActivations, draws: DropoutDraws | None = None) -> Tensor:
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
                in tower order along dimension 1, or those that are `PendingActivations`. Called before conv3, fc6, fc7 and fc8.

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
