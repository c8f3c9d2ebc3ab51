"""The two recipes of 2012: every setting of network and training, each with its source, and the schedules as functions.

`SOURCE2012` is what the released source did; it gave the published results. `PAPER` is what the text says. Every
disagreement between them is a field of `Recipe`; `model.changes` changes one thing of a recipe at a time. Two
abbreviations name the sources in the comments:

    P 5    section 5 of the paper (Krizhevsky, Sutskever, Hinton: "ImageNet Classification with Deep Convolutional
           Neural Networks", 2012)
    145    layers-145.cfg of the released source, with its parameter file and the run notes at the ends of both files

The schedules return plain numbers: learning rates per layer, and the coefficient of the PCA lighting noise (PCA:
principal component analysis of the RGB values).

Three habits of the released data loader have no field, because a loader that draws anew for every image cannot have
them: it used one crop and flip for 32 consecutive images, it kept one fixed order of files and images, and it reused
the last lighting noise when the next draw was late (convdata_jpeg.py).

This module imports neither torch nor NumPy, so that command lines can list recipes without loading them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
# With conv6 of CNN* (P 6). Its place at the end keeps the random draws of the other layers, which depend on theirs.
ALL_LAYERS = (*LAYERS, "conv6")
IN_ORDER = (*LAYERS[:5], "conv6", *LAYERS[5:])

PRECISIONS = ("float32", "tf32", "bfloat16")  # of products: `model.precision`; 2012 used float32
PRECISIONS_OF = {"cpu": ("float32", "bfloat16"), "cuda": PRECISIONS}  # by device
LRN_FORMS = ("eager", "triton")  # how LRN is computed: `model.response_norm`

LrnForm = Literal["eager", "triton"]

After = Literal["relu", "tanh", "lrn", "lrn_within_map", "pool", "pool_2x2", "dropout"]
Structure = Literal["two-towers", "no-communication", "one-tower"]


@dataclass(frozen=True)
class LocalResponseNorm:
    """Settings of local response normalisation (LRN): x / (k + alpha * sum of x^2 over a window)^beta.

    Attributes:
        window: side of the window, in feature maps (`Recipe.lrn`) or in pixels (`Recipe.lrn_within_map`). It is centred
            and cut off at the ends.
        alpha: factor on every squared term. The source divides the `scale` of its files by the window's area
            (layer.py:1183); torch and Caffe divide theirs by the window, too. Here nothing is divided.
        beta: the exponent.
        k: constant that is added to the sum.
    """

    window: int
    alpha: float
    beta: float
    k: float


@dataclass(frozen=True)
class LayerRecipe:
    """How one layer starts, and what follows it.

    Attributes:
        name: one of `ALL_LAYERS`.
        weight_sd: standard deviation of the normal distribution (mean 0) that the weights are drawn from.
        bias: value that all biases start with.
        after: the operations behind the layer, in order.
    """

    name: str
    weight_sd: float
    bias: float
    after: tuple[After, ...] = ()


@dataclass(frozen=True)
class LearningRatesFrom:
    """A step of the learning rate schedule.

    Attributes:
        epoch: first epoch of the step; epochs count from 0.
        layers: the layers that it concerns.
        weight: learning rate of their weights; 0 freezes them.
        bias: learning rate of their biases; 0 freezes them.
    """

    epoch: int
    layers: tuple[str, ...]
    weight: float
    bias: float


@dataclass(frozen=True)
class Plateau:
    """Lowers all learning rates when the validation error stops improving.

    Attributes:
        divisor: each reduction divides the learning rates by it.
        max_reductions: number of reductions after which the learning rates stay.
        patience_epochs: epochs without a new lowest error that lead to a reduction.
    """

    divisor: float
    max_reductions: int
    patience_epochs: int


@dataclass(frozen=True)
class Recipe:
    """All settings of one way to train the network; the comments at `SOURCE2012` and `PAPER` name their sources.

    Attributes:
        name: the key in `RECIPES`.
        layers: one entry for each layer, in order. A changed recipe may lack one of `LAYERS` or have conv6.
        lrn: local response normalisation (LRN) across the feature maps of a tower.
        lrn_within_map: LRN over neighbouring pixels of one feature map; None if no layer has it.
        dropout_keep: probability that a unit of fc6 and fc7 is kept in training; at test its activation is multiplied
            by this number instead.
        batch: images of a minibatch; the optimizer step uses their mean gradient.
        epochs: length of the full run.
        momentum: factor on the velocity in every optimizer step.
        weight_decay: decay of the weights, in units of the learning rate.
        bias_decay: decay of the biases, in units of the learning rate.
        learning_rates: the schedule for a run of `epochs`; a later entry overrules an earlier one.
        plateau: how validation lowers all learning rates; None if only the epoch decides.
        lighting: name of the convention that turns the eigenbasis of the RGB pixels into lighting noise.
        lighting_noise: coefficient of the PCA lighting noise.
        lighting_noise_ends: epoch (of `epochs`) from which on there is no lighting noise; None for never.
        mean: what is subtracted from the pixels; "image" is the mean of every pixel over the training set.
        crop_positions: number of offsets of the 224 x 224 crop along each side of the 256 x 256 square.
        learning_rate_scale: factor on all learning rates; 1 is the recipe itself.
        structure: "two-towers" is the network of 2012. `model.shapes` has the layers of the other two.
        input_scale: factor on the images; 1 keeps pixel values 0-255.
        changes: names of the changes (`model.changes`) that made this recipe from the one called `name`.
    """

    name: str
    layers: tuple[LayerRecipe, ...]
    lrn: LocalResponseNorm
    lrn_within_map: LocalResponseNorm | None
    dropout_keep: float
    batch: int
    epochs: int
    momentum: float
    weight_decay: float
    bias_decay: float
    learning_rates: tuple[LearningRatesFrom, ...]
    plateau: Plateau | None
    lighting: Literal["source2012", "paper", "none"]
    lighting_noise: float
    lighting_noise_ends: int | None
    mean: Literal["image"]
    crop_positions: int
    learning_rate_scale: float = 1.0
    structure: Structure = "two-towers"
    input_scale: float = 1.0
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        assert names == [name for name in IN_ORDER if name in names] and {"conv1", "fc8"} <= set(names)
        if not 0 < self.learning_rate_scale < math.inf:
            found = f"learning_rate_scale {self.learning_rate_scale}"
            raise ValueError(f"{found}, expected a positive number; 1.0 keeps the recipe's own learning rates")

    def layer(self, name: str) -> LayerRecipe:
        """The entry of the layer called `name`."""
        return next(layer for layer in self.layers if layer.name == name)


SOURCE2012 = Recipe(
    name="source2012",
    layers=(  # standard deviations, biases and order of layers: layers-145.cfg
        LayerRecipe("conv1", 0.01, 0.0, ("lrn", "pool", "relu")),  # LRN of signed activations, before the ReLU
        LayerRecipe("conv2", 0.01, 1.0, ("relu", "lrn", "lrn_within_map", "pool")),  # lrn_within_map: not in the paper
        LayerRecipe("conv3", 0.03, 0.0, ("relu",)),
        LayerRecipe("conv4", 0.03, 1.0, ("relu",)),
        LayerRecipe("conv5", 0.03, 1.0, ("pool", "relu")),
        LayerRecipe("fc6", 0.01, 1.0, ("relu", "dropout")),
        LayerRecipe("fc7", 0.01, 1.0, ("relu", "dropout")),
        LayerRecipe("fc8", 0.01, 0.0),
    ),
    # 145: scale 1e-4, pow 0.75, minDiv 2; layer.py:1183 divides the scale by the window
    lrn=LocalResponseNorm(window=5, alpha=1e-4 / 5, beta=0.75, k=2.0),
    # 145: scale 1e-3; k is 1 in the public kernels
    lrn_within_map=LocalResponseNorm(window=5, alpha=1e-3 / 25, beta=0.75, k=1.0),
    dropout_keep=0.5,  # layer.cu:1126
    batch=128,  # convnet.py:177
    epochs=91,  # 145, run notes
    momentum=0.9,  # 145: momW, momB
    weight_decay=0.0005,  # 145: wc
    bias_decay=0.0,  # layer.cu:565
    # 145, run notes of the 2012 run. The notes do not say whether a change comes before or after the epoch they name;
    # here epoch 25 is the one after 25 whole epochs. The bias learning rates 0.02 and 0.002 are in the parameter files.
    # The files do not say when 0.002 replaced 0.02; here it does so at the first drop of the weights' learning rate.
    learning_rates=(
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
        LayerRecipe("conv1", 0.01, 0.0, ("relu", "lrn", "pool")),  # LRN after the ReLU: P 3.3, 3.5
        LayerRecipe("conv2", 0.01, 1.0, ("relu", "lrn", "pool")),
        LayerRecipe("conv3", 0.01, 0.0, ("relu",)),
        LayerRecipe("conv4", 0.01, 1.0, ("relu",)),
        LayerRecipe("conv5", 0.01, 1.0, ("relu", "pool")),  # P 3.5; the same numbers as pooling first
        LayerRecipe("fc6", 0.01, 1.0, ("relu", "dropout")),
        LayerRecipe("fc7", 0.01, 1.0, ("relu", "dropout")),
        LayerRecipe("fc8", 0.01, 0.0),
    ),
    lrn=LocalResponseNorm(window=5, alpha=1e-4, beta=0.75, k=2.0),  # P 3.3, read literally: alpha times the plain sum
    lrn_within_map=None,
    dropout_keep=0.5,  # P 4.2
    batch=128,  # P 5
    epochs=90,  # P 5: "roughly 90 cycles"
    momentum=0.9,  # P 5
    weight_decay=0.0005,  # P 5
    bias_decay=0.0,  # P 5 states its rule for a weight w and names biases apart from weights: read as no decay
    learning_rates=(LearningRatesFrom(0, LAYERS, weight=0.01, bias=0.01),),  # P 5: "equal ... for all layers"
    # P 5: divided by 10 when the validation error stopped improving, three times; the authors judged that by hand. The
    # patience is our choice: a fifth of the 23 to 28 epochs for which the 2012 run kept a learning rate (145, run
    # notes).
    plateau=Plateau(divisor=10.0, max_reductions=3, patience_epochs=5),
    lighting="paper",  # P 4.1
    lighting_noise=0.1,  # P 4.1
    lighting_noise_ends=None,
    mean="image",  # P 2: "the mean activity over the training set from each pixel"
    crop_positions=32,  # P 4.1: 2048 = 32 x 32 x 2
)

RECIPES: dict[str, Recipe] = {known.name: known for known in (SOURCE2012, PAPER)}


def recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: if there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class LayerLearningRates:
    """Learning rates of one layer. At 0 its parameters and velocities stay as they are (weights.cu:148)."""

    weight: float
    bias: float


@dataclass(frozen=True)
class PlateauState:
    """What the plateau schedule remembers between validations.

    It holds plain numbers, so that `PlateauState(**asdict(state)) == state`, also through JSON.

    Attributes:
        best_error: lowest validation error so far.
        epochs_since: epochs since the lowest error, or since the last reduction if that came later.
        reductions: number of times that the learning rates were divided.
    """

    best_error: float = math.inf
    epochs_since: int = 0
    reductions: int = 0

    def step(self, val_error: float, plateau: Plateau) -> PlateauState:
        """The state after one more epoch, at whose end the validation error was `val_error`."""
        if val_error < self.best_error:
            return PlateauState(val_error, 0, self.reductions)
        epochs_since = self.epochs_since + 1
        if epochs_since < plateau.patience_epochs or self.reductions == plateau.max_reductions:
            return PlateauState(self.best_error, epochs_since, self.reductions)
        return PlateauState(self.best_error, 0, self.reductions + 1)


def learning_rates(recipe: Recipe, epoch: int, epochs: int, reductions: int = 0) -> dict[str, LayerLearningRates]:
    """Learning rates of every layer.

    A shorter or longer run keeps the proportions of the recipe's schedule: a change takes effect in the first epoch
    that starts at or after its share of the run.

    Args:
        recipe: gives the schedule.
        epoch: counts from 0.
        epochs: length of the run.
        reductions: times that the plateau schedule has lowered the learning rates (`PlateauState.reductions`).

    Raises:
        ValueError: if the run has no such epoch.
    """
    divisor = 1.0 if recipe.plateau is None else recipe.plateau.divisor**reductions
    factor = recipe.learning_rate_scale / divisor
    now: dict[str, LayerLearningRates] = {}
    for change in recipe.learning_rates:
        if _reached(recipe, change.epoch, epoch, epochs):
            now |= dict.fromkeys(change.layers, LayerLearningRates(change.weight * factor, change.bias * factor))
    return now


def lighting_noise(recipe: Recipe, epoch: int, epochs: int) -> float:
    """Coefficient of the PCA lighting noise in `epoch` (from 0) of a run of `epochs`; 0 leaves the pixels as they are.

    Raises:
        ValueError: if the run has no such epoch.
    """
    ends = recipe.lighting_noise_ends
    return 0.0 if ends is not None and _reached(recipe, ends, epoch, epochs) else recipe.lighting_noise


def _reached(recipe: Recipe, milestone: int, epoch: int, epochs: int) -> bool:
    """Whether `epoch` is at or past `milestone`, which is an epoch of the recipe's own run; both as shares of their
    runs, compared in integers."""
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch {epoch} is not in a run of {epochs}; epochs count from 0")
    return epoch * recipe.epochs >= milestone * epochs
