"""The network of 2012: layers, two towers, forward pass. It runs on the device of its tensors.

Takes images (N, 3, 224, 224), float, pixel values 0-255 with the mean subtracted; gives logits (N, classes).
The structure is that of layers-145.cfg of the released source (paper section 3.5). What paper and source disagree about
comes from the recipe.

Letters in shapes: N images (this rank's rows of a batch); T towers that this rank holds, 1 or 2; C feature maps of one
tower, or units of a fully connected layer; H and W rows and columns of a feature map. Activations are (N, T*C, H, W) or
(N, T*C), one tower after the other. Parameters are stacked in the same way along dimension 0;
`model.shapes.tower_slice` cuts out one tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dropout import DropoutDraws, seeded_generator
from model.recipe import ALL_LAYERS, SOURCE2012, LrnForm, Recipe
from model.response_norm import lrn_across_maps, lrn_within_map
from model.shapes import IMAGE_CHANNELS, IMAGE_SIDE, POOL_SIZE, POOL_STRIDE, TOWERS, LayerShape, NetSpec, layer_table


@dataclass(frozen=True)
class PendingActivations:
    """Activations of both towers, of which the other rank's are still pending.

    Attributes:
        own: activations of this rank's tower, (N, C, ...).
        tower: the tower of this rank.
        wait_other: waits for the other tower's activations, (N, C, ...), and returns them.
    """

    own: Tensor
    tower: int
    wait_other: Callable[[], Tensor]


Exchange = Callable[[Tensor, str], Tensor | PendingActivations]


class Layer(nn.Module):
    """One layer and the operations that follow it, for the towers of this rank.

    `weight` is (T*C, in_channels, kernel, kernel), or (T*C, inputs) if fully connected; `bias` is (T*C,). Each tower's
    starting weights are drawn on their own, so they do not depend on whether the rank holds the other tower.
    """

    lrn_form: LrnForm = "eager"  # `use_lrn` changes it

    def __init__(self, shape: LayerShape, recipe: Recipe, towers: tuple[int, ...], seed: int, weight_sd: float) -> None:
        super().__init__()
        self.shape, self.recipe, self.towers = shape, recipe, towers
        self.settings = recipe.layer(shape.name)
        fan_in = (shape.in_channels, shape.kernel, shape.kernel)
        is_conv = shape.name.startswith("conv")
        size = (shape.out_channels, *fan_in) if is_conv else (shape.out_channels, math.prod(fan_in))
        cpu = torch.device("cpu")  # drawn there, so that the starting weights do not depend on the device
        generators = [seeded_generator(cpu, seed, ALL_LAYERS.index(shape.name), tower) for tower in towers]
        weights = [torch.empty(size, device=cpu).normal_(0, weight_sd, generator=each) for each in generators]
        self.weight = nn.Parameter(torch.cat(weights))
        self.bias = nn.Parameter(torch.full((len(self.weight),), self.settings.bias))

    def forward(self, x: Tensor | PendingActivations, draws: DropoutDraws | None) -> Tensor:
        """The layer's products, then the operations that the recipe names, in its order."""
        x = self._both_towers(x) if isinstance(x, PendingActivations) else self._products(x, self.weight, self.bias)
        for operation in self.settings.after:
            match operation:
                case "relu":
                    x = F.relu(x)
                case "tanh":
                    x = torch.tanh(x)
                case "pool":
                    x = F.max_pool2d(x, POOL_SIZE, POOL_STRIDE)
                case "pool_2x2":
                    x = F.max_pool2d(x, 2, 2)
                case "lrn":
                    x = lrn_across_maps(x, self.recipe.lrn, len(self.towers), self.lrn_form)
                case "lrn_within_map":
                    assert self.recipe.lrn_within_map is not None
                    x = lrn_within_map(x, self.recipe.lrn_within_map, self.lrn_form)
                case "dropout":
                    x = self._dropout(x, draws)
        return x

    def _both_towers(self, x: PendingActivations) -> Tensor:
        """Products with both towers' activations, while the other tower's are still pending.

        A convolution is a sum over feature maps. So this rank's share is computed first, and the transfer runs
        meanwhile. Fully connected layers wait first: their activations are few, and slicing their many weights took
        longer than the wait (LOG.md).
        """
        if self.weight.dim() == 2:
            pair = [x.own, x.wait_other()]
            return self._products(torch.cat(pair if x.tower == 0 else pair[::-1], dim=1), self.weight, self.bias)
        weights = self.weight.chunk(len(TOWERS), dim=1)
        own = self._products(x.own, weights[x.tower], self.bias)
        return own + self._products(x.wait_other(), weights[1 - x.tower], None)

    def _products(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = self.shape
        if weight.dim() == 2:
            x = x.flatten(1)
            if x.shape[1] == weight.shape[1]:
                return F.linear(x, weight, bias)
            assert bias is not None  # each tower reads its own half of x
            count = len(TOWERS)
            parts = zip(x.chunk(count, dim=1), weight.chunk(count), bias.chunk(count), strict=True)
            return torch.cat([F.linear(*part) for part in parts], dim=1)
        if shape.overhang:
            x = F.pad(x, (0, shape.overhang, 0, shape.overhang))
        groups = x.shape[1] // weight.shape[1]  # 2 if each tower reads its own half of x, otherwise 1
        return F.conv2d(x, weight, bias, shape.stride, shape.pad, groups=groups)

    def _dropout(self, x: Tensor, draws: DropoutDraws | None) -> Tensor:
        """Training zeroes units and does not rescale the others. At test every unit is kept and multiplied by the
        probability of being kept (paper section 4.2; layer.cu:1126)."""
        keep = self.recipe.dropout_keep
        if not self.training:
            return x * keep
        if draws is None:
            raise ValueError("training needs DropoutDraws(seed, step); call eval() first to test the network")
        return x * draws.masks(self.shape.name, self.towers, len(x), self.shape.out_channels, keep, x.device)


def identity(x: Tensor, name: str) -> Tensor:
    """The exchange of a rank that holds both towers: it has all activations already."""
    return x


class AlexNet(nn.Module):
    """The network, or one tower of it. Each layer is a submodule: parameters are "conv1.weight", "conv1.bias" ...

    Args:
        spec: size.
        recipe: what follows each layer, and how parameters start.
        towers: the towers that this rank holds: (0, 1), (0,) or (1,). fc8 exists only on tower 0 (layers-145.cfg).
        seed: seed of the starting weights.

    Attributes:
        segments: names of this rank's layers in groups. A group is called by its first layer: conv1, conv3, fc6, fc7,
            fc8 (in 2012's structure). Towers exchange activations between two groups.

    Raises:
        ValueError: if `towers` is none of the three, or not both although the recipe's network has one tower.
    """

    def __init__(
        self, spec: NetSpec, recipe: Recipe = SOURCE2012, towers: tuple[int, ...] = TOWERS, seed: int = 0
    ) -> None:
        super().__init__()
        if towers not in (TOWERS, TOWERS[:1], TOWERS[1:]):
            raise ValueError(f"towers {towers}; a rank holds (0, 1), (0,) or (1,)")
        if recipe.structure == "one-tower" and towers != TOWERS:
            raise ValueError(f"towers {towers}; a network of one tower cannot be divided: every rank holds (0, 1)")
        self.spec, self.recipe, self.towers = spec, recipe, towers
        self.segments: dict[str, list[str]] = {}
        for shape, full in zip(layer_table(spec, recipe), layer_table(NetSpec(), recipe), strict=True):
            if shape.reads_both or not self.segments:
                segment = self.segments[shape.name] = []
            held = tuple(tower for tower in towers if tower in shape.towers)
            if held:
                segment.append(shape.name)
                weight_sd = recipe.layer(shape.name).weight_sd * math.sqrt(full.in_channels / shape.in_channels)
                self.add_module(shape.name, Layer(shape, recipe, held, seed, weight_sd))

    def use_lrn(self, form: LrnForm) -> None:
        """Chooses how every layer computes LRN."""
        for layer in self.children():
            assert isinstance(layer, Layer)
            layer.lrn_form = form

    def run_segment(self, first: str, x: Tensor | PendingActivations, draws: DropoutDraws | None = None) -> Tensor:
        """Runs the layers `segments[first]`.

        Args:
            first: name of the segment.
            x: images if `first` is "conv1", otherwise activations of both towers, (N, 2*C, ...).
            draws: dropout masks; only training needs them.
        """
        for name in self.segments[first]:
            x = self.get_submodule(name)(x, draws)
        assert isinstance(x, Tensor)
        return x

    def forward(self, images_nchw: Tensor, draws: DropoutDraws | None = None, exchange: Exchange = identity) -> Tensor:
        """Logits of images.

        Args:
            images_nchw: this rank's rows of the batch, (N, 3, 224, 224), pixel values 0-255 with the mean subtracted.
            draws: dropout masks of this step; only training needs them.
            exchange: called before conv3, fc6, fc7 and fc8 (in 2012's structure) with this rank's activations and the
                name of that layer, which reads both towers. It returns the activations of both towers, in tower order
                along dimension 1, or `PendingActivations`.

        Returns:
            Logits (N, classes). A rank without tower 0 has no fc8; it returns the result of the exchange before fc8.

        Raises:
            ValueError: if the images have another shape.
        """
        if images_nchw.shape[1:] != (IMAGE_CHANNELS, IMAGE_SIDE, IMAGE_SIDE):
            expected = f"(N, {IMAGE_CHANNELS}, {IMAGE_SIDE}, {IMAGE_SIDE})"
            raise ValueError(f"images {tuple(images_nchw.shape)}; expected {expected}")
        if self.recipe.input_scale != 1:
            images_nchw = images_nchw * self.recipe.input_scale
        x = self.run_segment("conv1", images_nchw, draws)
        for first in list(self.segments)[1:]:
            x = self.run_segment(first, exchange(x, first), draws)
        return x
