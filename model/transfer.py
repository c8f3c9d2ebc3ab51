"""Starts a network with the convolutions of a checkpoint, as CNN* of 2012 did after its pre-training.

Only convolutions are copied: fully connected layers start anew (145 -> Fall 2009 -> Fall 2011 -> 2012 in the run notes
of the released source; paper section 6). So the checkpoint may have other classes. Convolutions that it lacks start as
the recipe says.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from model.alexnet import AlexNet
from model.checkpoint import WEIGHTS, faults
from model.recipe import Recipe
from model.shapes import LayerShape, NetSpec, layer_table, tower_rows


def check(path: Path, spec: NetSpec, recipe: Recipe) -> list[LayerShape]:
    """The convolutions of a network that a checkpoint has, too.

    Raises:
        ValueError: the checkpoint is missing or damaged, has no convolution of this network, or one of another size.
    """
    if found := faults(path):
        raise ValueError("; ".join(found))
    convolutions = [shape for shape in layer_table(spec, recipe) if shape.name.startswith("conv")]
    common = []
    with safe_open(path / WEIGHTS, framework="pt") as file:
        there = set(file.keys())
        for shape in convolutions:
            name = f"{shape.name}.weight"
            if name not in there:
                continue
            expected, size = (
                [shape.biases, shape.in_channels, shape.kernel, shape.kernel],
                file.get_slice(name).get_shape(),
            )
            if size != expected:
                found_text = f"{name} is {_sizes(size)}, expected {_sizes(expected)}"
                raise ValueError(f"{path}: {found_text}; use a checkpoint of the same --width and structure")
            common.append(shape)
    if not common:
        raise ValueError(f"{path}: none of its layers is a convolution of this network; use another checkpoint")
    return common


def copy_convolutions(path: Path, model: AlexNet) -> list[str]:
    """Copies weights and biases of the convolutions that checkpoint and network both have.

    Args:
        path: the checkpoint.
        model: the network, of both towers or of one; each tower gets its own rows.

    Returns:
        Names of the layers that were copied.

    Raises:
        ValueError: as `check`.
    """
    common = [shape.name for shape in check(path, model.spec, model.recipe)]
    with safe_open(path / WEIGHTS, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.partition(".")[0] in common:
                rows = file.get_slice(name)
                parameter.copy_(rows[tower_rows(name, rows.get_shape()[0], model.towers)])
    return common


def _sizes(size: list[int]) -> str:
    return " x ".join(map(str, size))
