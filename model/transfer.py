"""Starts a network from the layers of another one, and keeps chosen layers as they are during training.

The paper trains networks on more classes first and then on the 1000 classes of the challenge (section 6). The released
source takes over the weights of the convolutions only in that case. Layers of the same name must have the same size, so
both networks need the same width; the number of classes may differ.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from model.alexnet import AlexNet
from model.checkpoint import STATE, WEIGHTS, faults
from model.recipe import LearningRatesFrom, Recipe
from model.shapes import tower_rows

LAYER_SETS = ("convolutions", "all-but-fc8")  # choices of --init-layers and --freeze


def layers_of(recipe: Recipe, layer_set: str) -> tuple[str, ...]:
    """The names of the layers in one of `LAYER_SETS`."""
    assert layer_set in LAYER_SETS
    names = tuple(layer.name for layer in recipe.layers)
    if layer_set == "convolutions":
        return tuple(name for name in names if name.startswith("conv"))
    return tuple(name for name in names if name != "fc8")


def check_source(path: Path, model_width: float) -> None:
    """Checks that layers can be taken from a checkpoint.

    Args:
        path: the checkpoint.
        model_width: width of the network that takes them.

    Raises:
        ValueError: the folder holds no checkpoint or a damaged one, or the network has another width.
    """
    if found := faults(path):
        raise ValueError("; ".join(found))
    width = json.loads((path / STATE).read_text())["spec"]["width"]
    if width != model_width:
        raise ValueError(f"{path}: a network of width {width:g}, expected {model_width:g}; add --width {width:g}")


def load_layers(path: Path, model: AlexNet, layer_set: str) -> list[str]:
    """Copies the weights and biases of some layers from a checkpoint into a network, of both towers or of one.

    All other layers, and all velocities, stay as they are. So do layers that the checkpoint lacks: CNN* of 2012 took
    five convolutions, and its sixth started anew.

    Args:
        path: the checkpoint.
        model: the network that takes the layers.
        layer_set: one of `LAYER_SETS`.

    Returns:
        Names of the layers that were copied.

    Raises:
        ValueError: as `check_source`, or the checkpoint has none of the layers, or one of another size.
    """
    check_source(path, model.spec.width)
    names, copied = layers_of(model.recipe, layer_set), list[str]()
    taken = {name: p for name, p in model.named_parameters() if name.partition(".")[0] in names}
    with safe_open(path / WEIGHTS, framework="pt") as file, torch.no_grad():
        there = set(file.keys())
        for name, parameter in taken.items():
            if name not in there:
                continue
            rows = file.get_slice(name)
            piece = rows[tower_rows(name, rows.get_shape()[0], model.towers)]
            if piece.shape != parameter.shape:
                found = f"{name} is {tuple(piece.shape)}, expected {tuple(parameter.shape)}"
                raise ValueError(f"{path}: {found}; take the layers of a network with the same recipe and width")
            parameter.copy_(piece)
            copied.append(name.partition(".")[0])
    if not copied:
        raise ValueError(f"{path}: has none of {', '.join(names)}; use the checkpoint of a network that has")
    return list(dict.fromkeys(copied))


def with_frozen(recipe: Recipe, layer_set: str) -> Recipe:
    """The recipe with the learning rate 0 for some layers in every epoch: no step, no decay, as weights.cu:148."""
    frozen = LearningRatesFrom(0, layers_of(recipe, layer_set), weight=0.0, bias=0.0)
    return replace(recipe, learning_rates=(*recipe.learning_rates, frozen))


def frozen_layers(recipe: Recipe) -> tuple[str, ...]:
    """The layers that `with_frozen` has frozen; none for a recipe of 2012."""
    last = recipe.learning_rates[-1]
    return last.layers if last.epoch == 0 and last.weight == last.bias == 0 else ()


def skip_frozen_gradients(model: AlexNet) -> None:
    """Leaves out the gradients of frozen layers, which no step would use. It changes no result and saves their time.

    Only for a rank that communicates with no other: ranks of a pair exchange gradients before conv3 in any case.
    """
    for name, parameter in model.named_parameters():
        if name.partition(".")[0] in frozen_layers(model.recipe):
            parameter.requires_grad_(False)
