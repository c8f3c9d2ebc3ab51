"""Named changes of a recipe: the ablations of the paper, the conventions on which sources differ, and common mistakes.

    changed(SOURCE2012, ["no-lrn"])         `python tools/train.py SHARDS --change no-lrn`

A change is a function from a recipe to a recipe. The result names its changes (`Recipe.changes`), so config.json and
checkpoints of a run hold them. The abbreviations of the sources are those of `model.recipe`. This module imports
neither torch nor NumPy, so that command lines can list the changes without loading them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from model.recipe import IN_ORDER, After, LayerRecipe, LearningRatesFrom, Recipe

UNIT_VARIANCE = 1 / 57.6  # pixel values: 0.226 of 255, the mean of torchvision's 0.229, 0.224 and 0.225


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        summary: what is different.
        apply: makes the changed recipe.
    """

    summary: str
    apply: Callable[[Recipe], Recipe]


def _each_layer(recipe: Recipe, change: Callable[[LayerRecipe], LayerRecipe]) -> Recipe:
    return replace(recipe, layers=tuple(change(layer) for layer in recipe.layers))


def _conv_sd(recipe: Recipe, sd: float) -> Recipe:
    above = ("conv3", "conv4", "conv5")
    return _each_layer(recipe, lambda layer: replace(layer, weight_sd=sd) if layer.name in above else layer)


def _bias(recipe: Recipe, start: float) -> Recipe:
    """Replaces the 1 with which the biases of conv2, conv4, conv5 and the hidden fully connected layers start (P 5)."""
    return _each_layer(recipe, lambda layer: replace(layer, bias=start) if layer.bias else layer)


def _after(recipe: Recipe, change: Callable[[tuple[After, ...]], tuple[After, ...]]) -> Recipe:
    return _each_layer(recipe, lambda layer: replace(layer, after=change(layer.after)))


def _without(recipe: Recipe, *operations: After) -> Recipe:
    return _after(recipe, lambda after: tuple(each for each in after if each not in operations))


def _instead(recipe: Recipe, old: After, new: After) -> Recipe:
    return _after(recipe, lambda after: tuple(new if each == old else each for each in after))


def _no_lrn(recipe: Recipe) -> Recipe:
    return replace(_without(recipe, "lrn", "lrn_within_map"), lrn_within_map=None)


def _lrn_alpha(recipe: Recipe, alpha: float) -> Recipe:
    return replace(recipe, lrn=replace(recipe.lrn, alpha=alpha))


def _learning_rates(recipe: Recipe, change: Callable[[LearningRatesFrom], LearningRatesFrom]) -> Recipe:
    return replace(recipe, learning_rates=tuple(change(each) for each in recipe.learning_rates))


def _bias_learning_rate(recipe: Recipe, factor: float) -> Recipe:
    return _learning_rates(recipe, lambda each: replace(each, bias=factor * each.weight))


def _constant_learning_rates(recipe: Recipe) -> Recipe:
    return replace(recipe, plateau=None, learning_rates=recipe.learning_rates[:1])


def _without_layer(recipe: Recipe, name: str) -> Recipe:
    """The layer goes, with its LRN and dropout. Its pooling moves to the layer before it, so that the layers behind it
    read feature maps of the same side."""
    gone = next((layer for layer in recipe.layers if layer.name == name), None)
    if gone is None:
        return recipe
    pools = tuple(each for each in gone.after if each.startswith("pool"))
    before = recipe.layers[recipe.layers.index(gone) - 1]
    kept = [layer for layer in recipe.layers if layer is not gone]
    layers = tuple(replace(layer, after=(*layer.after, *pools)) if layer is before else layer for layer in kept)
    without = _learning_rates(recipe, lambda each: replace(each, layers=tuple(n for n in each.layers if n != name)))
    return replace(without, layers=layers)


def _sixth_conv(recipe: Recipe) -> Recipe:
    """CNN* (P 6, run 146): 3 x 3, 128 feature maps for each tower, reads both towers' pooled conv5."""
    if any(layer.name == "conv6" for layer in recipe.layers):
        return recipe
    added = LayerRecipe("conv6", weight_sd=0.03, bias=1.0, after=("relu",))
    layers = tuple(sorted((*recipe.layers, added), key=lambda layer: IN_ORDER.index(layer.name)))
    with_it = _learning_rates(
        recipe, lambda each: replace(each, layers=(*each.layers, "conv6")) if "fc6" in each.layers else each
    )
    return replace(with_it, layers=layers)


# In the order in which they are applied: a layer that one change adds is also changed by those behind it.
CHANGES: dict[str, Change] = {
    # Structure
    "one-tower": Change("one tower of equal size (P 3.2, footnote 2)", partial(replace, structure="one-tower")),
    "no-communication": Change("towers meet in fc8 only (run 150)", partial(replace, structure="no-communication")),
    **{
        f"no-{name}": Change(f"without {name} (P 7)", partial(_without_layer, name=name))
        for name in ("conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
    },
    "sixth-conv": Change("a sixth convolution, as in CNN* (P 6)", _sixth_conv),
    # How parameters start and learn
    "conv-sd-0.01": Change("weights of conv3 to conv5 start with sd 0.01 (P 5)", partial(_conv_sd, sd=0.01)),
    "conv-sd-0.03": Change("weights of conv3 to conv5 start with sd 0.03 (145)", partial(_conv_sd, sd=0.03)),
    "bias-0": Change("all biases start at 0", partial(_bias, start=0.0)),
    "bias-0.1": Change("biases that start at 1 start at 0.1 (Caffe's replica)", partial(_bias, start=0.1)),
    "bias-lr-1x": Change("learning rate of biases: that of weights", partial(_bias_learning_rate, factor=1.0)),
    "bias-lr-2x": Change("learning rate of biases: twice that of weights", partial(_bias_learning_rate, factor=2.0)),
    "constant-lr": Change("the learning rates of the start, for the whole run", _constant_learning_rates),
    # Input
    "unit-variance": Change("images divided by 57.6, to unit variance", partial(replace, input_scale=UNIT_VARIANCE)),
    "lighting-source2012": Change("lighting noise of the source", partial(replace, lighting="source2012")),
    "lighting-paper": Change("lighting noise of the paper's formula", partial(replace, lighting="paper")),
    "no-lighting": Change("no lighting noise", partial(replace, lighting="none")),
    # What follows the layers
    "lrn-alpha-sum": Change("LRN multiplies the sum by alpha (P 3.3)", partial(_lrn_alpha, alpha=1e-4)),
    "lrn-alpha-mean": Change("LRN multiplies the mean by alpha (layer.py:1183)", partial(_lrn_alpha, alpha=1e-4 / 5)),
    "no-lrn": Change("no LRN (P 3.3)", _no_lrn),
    "non-overlapping-pooling": Change("pooling 2 x 2, stride 2 (P 3.4)", partial(_instead, old="pool", new="pool_2x2")),
    "tanh": Change("tanh instead of ReLU (P 3.1)", partial(_instead, old="relu", new="tanh")),
    "no-dropout": Change("no dropout (P 4.2)", lambda recipe: _without(recipe, "dropout")),
}


def changed(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with the changes `names`, which are applied in the order of `CHANGES`.

    Raises:
        ValueError: no change has such a name, one is named twice, or one changes nothing in this recipe.
    """
    for name in names:
        if name not in CHANGES:
            raise ValueError(f"no change is called {name!r}; choose from {', '.join(CHANGES)}")
        if list(names).count(name) > 1:
            raise ValueError(f"change {name} is given twice; give it once")
    ordered = [name for name in CHANGES if name in names]
    result = recipe
    for name in ordered:
        after = CHANGES[name].apply(result)
        if after == result:
            raise ValueError(f"change {name} changes nothing in {_title(recipe, ordered)}; leave it out")
        result = after
    for name in ordered:
        if CHANGES[name].apply(result) != result:
            raise ValueError(f"another change undoes {name} in {_title(recipe, ordered)}; leave one of them out")
    return replace(result, changes=tuple(ordered))


def _title(recipe: Recipe, names: Sequence[str]) -> str:
    return f"recipe {recipe.name}" + (f" with {', '.join(names)}" if len(names) > 1 else "")
