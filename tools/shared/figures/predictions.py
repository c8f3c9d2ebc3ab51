"""Figure 4 of the paper: the five most probable classes of images, and the images with the nearest features."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.alexnet import AlexNet
from model.checkpoint import load_data, load_model
from model.recipe import RECIPES
from pipeline.loader.loader import view_loader
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.reader import ShardSet, open_shards
from tools.shared.checkpoint_data import eigenbasis_of_checkpoint
from tools.shared.cli import Progress
from tools.shared.figures import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4  # images side by side
NEAREST = 6  # neighbours of each image; the paper shows six
SHOWN_LETTERS = 22  # of a class name


@torch.no_grad()
def outputs(model: AlexNet, checkpoint: Path, shards: ShardSet, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Probabilities (N, classes) and last hidden activations (N, 2 * fc7) of the centre crops of a shard set."""
    settings = LoaderSettings(batch=batch, mean=model.recipe.mean)
    probabilities, features, hidden = [], [], list[Tensor]()

    def exchange(x: Tensor, name: str) -> Tensor:
        if name == "fc8":
            hidden.append(x)
        return x

    model.eval()
    views = view_loader(shards, eigenbasis_of_checkpoint(checkpoint), settings)
    with Progress(shards.folder.name, len(shards)) as progress:
        for one in views:
            probabilities.append(model(one.images[:, 0], exchange=exchange).softmax(1))
            features.append(hidden.pop())
            progress(len(one.labels))
    return torch.cat(probabilities), torch.cat(features)


def spread_ids(count: int, samples: int) -> list[int]:
    """`count` sample ids at equal distances."""
    return [int(one) for one in np.linspace(0, samples - 1, min(count, samples))]


def stored_image(shards: ShardSet, sample: int) -> np.ndarray:
    """A stored image, uint8 (H, W, 3)."""
    with Image.open(BytesIO(next(iter(shards.jpegs(np.array([sample])))).tobytes())) as image:
        return np.asarray(image)


def nearest(queries: Tensor, features: Tensor, count: int) -> Tensor:
    """The rows of `features` (N, D) with the smallest Euclidean distance to each of `queries` (Q, D): (Q, count)."""
    return torch.cdist(queries, features).topk(min(count, len(features)), dim=1, largest=False).indices


def top5_figure(images: list[np.ndarray], labels: list[int], probabilities: Tensor, names: list[str]) -> Figure:
    """Draws each image with the five most probable classes below it; the true class is red."""
    rows = -(-len(images) // COLUMNS)
    figure, axes = plot.subplots(2 * rows, COLUMNS, 9.0, 3.4 * rows)
    plot.hide(axes)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        above, below = (
            axes[2 * (number // COLUMNS), number % COLUMNS],
            axes[2 * (number // COLUMNS) + 1, number % COLUMNS],
        )
        plot.show_image(above, image, names[label][:SHOWN_LETTERS])
        best = probabilities[number].topk(min(5, len(names)))
        colours = [plot.TRUE_COLOUR if one == label else plot.OTHER_COLOUR for one in best.indices.tolist()]
        below.set_axis_on()
        below.barh(range(len(colours)), best.values.tolist(), color=colours)
        below.set(xlim=(0, 1), yticks=[], xticks=[])
        below.invert_yaxis()
        for row, one in enumerate(best.indices.tolist()):
            below.text(0.02, row, names[one][:SHOWN_LETTERS], fontsize=7, va="center")
    return figure


def neighbours_figure(queries: list[np.ndarray], found: list[list[np.ndarray]]) -> Figure:
    """Draws each query in the first column, and the images with the nearest features to its right."""
    figure, axes = plot.subplots(len(queries), 1 + NEAREST, 9.0, 1.35 * len(queries))
    plot.hide(axes)
    for row, query, images in zip(axes, queries, found, strict=True):
        for each, image in zip(row, [query, *images], strict=False):
            plot.show_image(each, image)
    axes[0, 0].set_title("query", fontsize=7)
    axes[0, 1].set_title("nearest first", fontsize=7)
    return figure


def _opened(checkpoint: Path, shards: Path) -> tuple[AlexNet, ShardSet, list[str]]:
    opened, classes = open_shards(shards), load_data(checkpoint).classes
    if [wnid for wnid, _ in classes] != [one.wnid for one in opened.manifest.classes]:
        raise ValueError(f"{checkpoint}: trained on other classes than those of {shards}; name shards of its own data")
    return load_model(checkpoint, RECIPES), opened, [words.partition(",")[0] or wnid for wnid, words in classes]


def draw_top5(checkpoint: Path, shards: Path, count: int, out: Path) -> str:
    """Draws the left part of Figure 4 for `count` images of a shard set. Returns what was drawn."""
    model, opened, names = _opened(checkpoint, shards)
    ids = spread_ids(count, len(opened))
    probabilities, _ = outputs(model, checkpoint, opened.part(np.array(ids)))
    labels = opened.index["label"][ids].tolist()
    plot.save(top5_figure([stored_image(opened, one) for one in ids], labels, probabilities, names), out)
    return f"{len(ids)} images of {shards}"


def draw_neighbours(checkpoint: Path, shards: Path, queries: Path, count: int, out: Path) -> str:
    """Draws the right part of Figure 4: `count` images of `queries` and their neighbours in `shards`."""
    model, opened, _ = _opened(checkpoint, shards)
    asked = open_shards(queries)
    ids = spread_ids(count, len(asked))
    _, features = outputs(model, checkpoint, opened)
    _, asked_features = outputs(model, checkpoint, asked.part(np.array(ids)))
    rows = nearest(asked_features, features, NEAREST).tolist()
    found = [[stored_image(opened, one) for one in row] for row in rows]
    plot.save(neighbours_figure([stored_image(asked, one) for one in ids], found), out)
    return f"{len(ids)} images of {queries} and their {NEAREST} nearest in {shards}"
