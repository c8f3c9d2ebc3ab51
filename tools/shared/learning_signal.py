"""How much of the logits depends on the image before the first optimizer step.

Every activation has a part that is the same for all images, because of biases, and a part that differs between them.
The second part is the signal. If it is small in the logits, so are the gradients of all layers but the last, and the
loss stays at chance until their steps have added up.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.alexnet import AlexNet
from model.changes import changed
from model.recipe import recipe
from model.shapes import NetSpec
from pipeline import rgb_pca
from pipeline.loader.loader import TrainLoader
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.reader import open_shards
from tools.shared.learning_rows import parts_of

IMAGES, SEEDS = 64, (1, 2, 3)


def first_images(shards: Path) -> Tensor:
    """The first augmented images of a train shard set, as many as `IMAGES` or as it has."""
    opened = open_shards(shards)
    settings = LoaderSettings(batch=min(IMAGES, len(opened)), seed=SEEDS[0], threads=1)
    with TrainLoader(opened, rgb_pca.load_for(opened), settings) as loader:
        return next(loader).images.clone()


def signal_at_start(row: str, width: float, classes: int, images_nchw: Tensor) -> float:
    """The signal in the logits: their standard deviation over the images, over their root mean square.

    Args:
        row: names recipe and changes; the images are those of the recipe "source2012" for all rows.
        width: of the network.
        classes: of the network.
        images_nchw: as the loader gives them.

    Returns:
        The mean over `SEEDS`, from 0 (all images have the same logits) to about 1.
    """
    name, changes = parts_of(row)
    found = []
    for seed in SEEDS:
        net = AlexNet(NetSpec(classes, width), changed(recipe(name), changes), seed=seed).eval()
        with torch.no_grad():
            logits = net(images_nchw)
        found.append(float(logits.std(dim=0).square().mean().sqrt() / logits.square().mean().sqrt()))
    return round(sum(found) / len(found), 4)
