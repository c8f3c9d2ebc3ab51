"""The two recipes of 2012: every setting of network and training, each with its source, and the schedules as functions.

`SOURCE2012` is what the released source did (it gave the published digits), `PAPER` is what the text says. Where they
disagree there is a field. "145" is layers-145.cfg with its parameter file and the run notes at their ends; "P 5" is
section 5 of the paper. What comes out is plain numbers: rates per layer, the coefficient of the colour noise.

Three habits of the released feed are no fields, because a feed that draws afresh for each image cannot have them: one
crop and flip for every 32 consecutive images, one fixed order of files and images, and colour noise used again when
the next draw was late (convdata_jpeg.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")

After = Literal["relu", "norm", "map_norm", "pool", "dropout"]


@dataclass(frozen=True)
class Norm:
    """Response normalisation: x / (k + alpha * sum of x^2 over the window)^beta.

    Attributes:
        size: side of the window, in maps (`norm`) or in pixels (`map_norm`); centred, cut off at the ends.
        alpha: factor on every squared term. The source divides the `scale` of its files by the window's area
            (layer.py:1183); torch and Caffe divide theirs by the size too.
        beta: the exponent.
        k: what is added to the sum.
    """

    size: int
    alpha: float
    beta: float
    k: float


@dataclass(frozen=True)
class LayerRecipe:
    """How a layer starts, normal weights of `weight_sd` and equal biases, and which steps follow it in which order."""

    name: str
    weight_sd: float
    bias: float
    after: tuple[After, ...] = ()


@dataclass(frozen=True)
class LearningRatesFrom:
    """From the start of `epoch` (0 is the first), `layers` learn at the rates `weight` and `bias`; 0 freezes them."""

    epoch: int
    layers: tuple[str, ...]
    weight: float
    bias: float


@dataclass(frozen=True)
class Plateau:
    """Divide rates by `divisor` when the validation error has not improved for `patience_epochs`, `most` times."""

    divisor: float
    most: int
    patience_epochs: int


@dataclass(frozen=True)
class Recipe:
    """All settings of one way to train the network; the comments at `SOURCE2012` and `PAPER` name their sources.

    Attributes:
        name: what `recipe` finds it by.
        layers: one entry for each of `LAYERS`, in that order.
        norm: response normalisation across the maps of a tower.
        map_norm: normalisation within a map; None where no layer has it.
        dropout_keep: chance that a unit of fc6 and fc7 is kept in training; its activation is scaled by it at test.
        batch: images of a minibatch, whose mean gradient makes one update.
        epochs: length of the full run.
        momentum: what is left of the velocity after an update.
        weight_decay: pull of the update on weights, in units of the rate.
        bias_decay: the same on biases.
        rates: learning rates by epoch of a run of `epochs`; a later entry overrules an earlier one.
        plateau: how validation lowers all rates; None where epochs alone decide.
        lighting: name of the convention that turns the eigenbasis of the pixels into colour noise.
        lighting_noise: coefficient of that noise.
        lighting_noise_ends: epoch (of `epochs`) from which there is none; None for never.
        mean: what is subtracted from the pixels: "image" is the mean of every pixel over the training set.
        crop_positions: places of the 224 crop along each side of the 256 square.
        learning_rate_scale: factor on all learning rates; 1 is the recipe.
    """

    name: str
    layers: tuple[LayerRecipe, ...]
    norm: Norm
    map_norm: Norm | None
    dropout_keep: float
    batch: int
    epochs: int
    momentum: float
    weight_decay: float
    bias_decay: float
    rates: tuple[LearningRatesFrom, ...]
    plateau: Plateau | None
    lighting: Literal["source2012", "paper"]
    lighting_noise: float
    lighting_noise_ends: int | None
    mean: Literal["image"]
    crop_positions: int
    learning_rate_scale: float = 1.0

    def __post_init__(self) -> None:
        assert tuple(layer.name for layer in self.layers) == LAYERS
        if not 0 < self.learning_rate_scale < math.inf:
            raise ValueError(
                f"learning_rate_scale {self.learning_rate_scale} is not a positive number; 1.0 is the recipe's own rates"
            )

    def layer(self, name: str) -> LayerRecipe:
        """The entry of the layer called `name`."""
        return self.layers[LAYERS.index(name)]


SOURCE2012 = Recipe(
    name="source2012",
    layers=(  # standard deviations, biases and order of layers: layers-145.cfg
        LayerRecipe("conv1", 0.01, 0.0, ("norm", "pool", "relu")),  # normalises signed responses
        LayerRecipe("conv2", 0.01, 1.0, ("relu", "norm", "map_norm", "pool")),  # map_norm: not in the paper
        LayerRecipe("conv3", 0.03, 0.0, ("relu",)),
        LayerRecipe("conv4", 0.03, 1.0, ("relu",)),
        LayerRecipe("conv5", 0.03, 1.0, ("pool", "relu")),
        LayerRecipe("fc6", 0.01, 1.0, ("relu", "dropout")),
        LayerRecipe("fc7", 0.01, 1.0, ("relu", "dropout")),
        LayerRecipe("fc8", 0.01, 0.0),
    ),
    norm=Norm(size=5, alpha=1e-4 / 5, beta=0.75, k=2.0),  # 145: scale 1e-4, pow 0.75, minDiv 2; layer.py:1183
    map_norm=Norm(size=5, alpha=1e-3 / 25, beta=0.75, k=1.0),  # 145: scale 1e-3; k is 1 in the public kernels
    dropout_keep=0.5,  # layer.cu:1126
    batch=128,  # convnet.py:177
    epochs=91,  # 145, run notes
    momentum=0.9,  # 145: momW, momB
    weight_decay=0.0005,  # 145: wc
    bias_decay=0.0,  # layer.cu:565
    # 145, run notes of the 2012 run, which do not say whether a change comes before or after the epoch they name;
    # here epoch 25 is the one after 25 whole ones. Bias rates 0.02 and 0.002 are in the parameter files; when the
    # first gave way to the second is left open there, and is put at the first drop of the weights' rate here.
    rates=(
        LearningRatesFrom(0, LAYERS, weight=0.01, bias=0.02),
        LearningRatesFrom(25, LAYERS, weight=0.001, bias=0.002),
        LearningRatesFrom(51, LAYERS, weight=0.0001, bias=0.002),
        LearningRatesFrom(67, LAYERS[:1], weight=0.00001, bias=0.002),
        LearningRatesFrom(72, LAYERS[:1], weight=0.0, bias=0.0),
        LearningRatesFrom(79, LAYERS[1:], weight=0.00001, bias=0.002),
    ),
    plateau=None,
    lighting="source2012",  # convdata_jpeg.py:155-179
    lighting_noise=0.1,  # convdata.py:40
    lighting_noise_ends=67,  # 145, run notes
    mean="image",  # convdata_jpeg.py:95
    crop_positions=33,  # convdata_jpeg.py:238-246: offsets 0 to 32
)

PAPER = Recipe(
    name="paper",
    layers=(  # standard deviation 0.01 everywhere, biases 1 in conv2, conv4, conv5, fc6, fc7: P 5
        LayerRecipe("conv1", 0.01, 0.0, ("relu", "norm", "pool")),  # normalised after the ReLU: P 3.3, 3.5
        LayerRecipe("conv2", 0.01, 1.0, ("relu", "norm", "pool")),
        LayerRecipe("conv3", 0.01, 0.0, ("relu",)),
        LayerRecipe("conv4", 0.01, 1.0, ("relu",)),
        LayerRecipe("conv5", 0.01, 1.0, ("relu", "pool")),  # P 3.5; the same numbers as pooling first
        LayerRecipe("fc6", 0.01, 1.0, ("relu", "dropout")),
        LayerRecipe("fc7", 0.01, 1.0, ("relu", "dropout")),
        LayerRecipe("fc8", 0.01, 0.0),
    ),
    norm=Norm(size=5, alpha=1e-4, beta=0.75, k=2.0),  # P 3.3, read literally: alpha times the plain sum
    map_norm=None,
    dropout_keep=0.5,  # P 4.2
    batch=128,  # P 5
    epochs=90,  # P 5: "roughly 90 cycles"
    momentum=0.9,  # P 5
    weight_decay=0.0005,  # P 5
    bias_decay=0.0,  # P 5 writes its rule for a weight w and names biases apart from weights: read as no decay
    rates=(LearningRatesFrom(0, LAYERS, weight=0.01, bias=0.01),),  # P 5: "an equal learning rate for all layers"
    # P 5: divided by 10 when the validation error stopped improving, three times. "Stopped improving" was judged by
    # hand; the patience is ours: a fifth of the 23 to 28 epochs that a rate was kept for in the run notes of 145.
    plateau=Plateau(divisor=10.0, most=3, patience_epochs=5),
    lighting="paper",  # P 4.1
    lighting_noise=0.1,  # P 4.1
    lighting_noise_ends=None,
    mean="image",  # P 2: "the mean activity over the training set from each pixel"
    crop_positions=32,  # P 4.1: 2048 = 32 x 32 x 2
)

RECIPES: dict[str, Recipe] = {known.name: known for known in (SOURCE2012, PAPER)}


def recipe(name: str) -> Recipe:
    """The recipe called `name`; ValueError where there is none."""
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class LayerLearningRates:
    """Learning rates of one layer; at 0 its parameters and velocities stay as they are (weights.cu:148)."""

    weight: float
    bias: float


@dataclass(frozen=True)
class PlateauState:
    """What the plateau schedule remembers between validations: plain numbers, `PlateauState(**asdict(state)) == state`.

    Attributes:
        best_error: lowest validation error so far.
        epochs_since: epochs since it was reached, or since the last reduction where that came later.
        reductions: how often the rate has been divided.
    """

    best_error: float = math.inf
    epochs_since: int = 0
    reductions: int = 0

    def step(self, val_error: float, plateau: Plateau) -> PlateauState:
        """The state after one more epoch, which ended with the validation error `val_error`."""
        if val_error < self.best_error:
            return PlateauState(val_error, 0, self.reductions)
        epochs_since = self.epochs_since + 1
        if epochs_since < plateau.patience_epochs or self.reductions == plateau.most:
            return PlateauState(self.best_error, epochs_since, self.reductions)
        return PlateauState(self.best_error, 0, self.reductions + 1)


def learning_rates(recipe: Recipe, epoch: int, epochs: int, reductions: int = 0) -> dict[str, LayerLearningRates]:
    """Learning rates of every layer in `epoch` (from 0) of a run of `epochs`, after `reductions` by the plateau.

    A shorter or longer run keeps the proportions of the recipe's: a change comes with the first epoch that starts at
    or after its share of the run. ValueError where the run has no such epoch.
    """
    divisor = 1.0 if recipe.plateau is None else recipe.plateau.divisor**reductions
    factor = recipe.learning_rate_scale / divisor
    now: dict[str, LayerLearningRates] = {}
    for change in recipe.rates:
        if _reached(recipe, change.epoch, epoch, epochs):
            now |= dict.fromkeys(change.layers, LayerLearningRates(change.weight * factor, change.bias * factor))
    return now


def lighting_noise(recipe: Recipe, epoch: int, epochs: int) -> float:
    """Coefficient of the colour noise in `epoch` (from 0) of a run of `epochs`; 0 means pixels are left as they are."""
    ends = recipe.lighting_noise_ends
    return 0.0 if ends is not None and _reached(recipe, ends, epoch, epochs) else recipe.lighting_noise


def _reached(recipe: Recipe, milestone: int, epoch: int, epochs: int) -> bool:
    """Whether `epoch` of `epochs` is at or past the share of its run that `milestone` has of the recipe's epochs."""
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch {epoch} is not in a run of {epochs}; epochs count from 0")
    return epoch * recipe.epochs >= milestone * epochs
