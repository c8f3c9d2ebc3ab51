"""How much the first optimizer step changes the weights of each layer: an explanation of the first plateau.

A layer whose weights hardly change does not learn, and the layers behind it get no better input. Gradients are small in
the lower layers if the logits hardly depend on the image (small weights above, or biases that outweigh them), and in
the upper layers if activations fade on their way (biases of 0 and small weights).
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F

from model.alexnet import AlexNet
from model.batch import Batch
from model.changes import changed
from model.dropout import DropoutDraws
from model.recipe import learning_rates, recipe
from model.shapes import NetSpec
from pipeline import rgb_pca
from pipeline.loader.loader import TrainLoader
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.reader import open_shards
from tools.shared.learning_rows import parts_of

IMAGES, SEEDS = 64, (1, 2, 3)


def first_batch(shards: Path) -> Batch:
    """The first augmented images of a train shard set, as many as `IMAGES` or as it has."""
    opened = open_shards(shards)
    settings = LoaderSettings(batch=min(IMAGES, len(opened)), seed=SEEDS[0], threads=1)
    with TrainLoader(opened, rgb_pca.load_for(opened), settings) as loader:
        return next(loader)


def relative_changes(row: str, spec: NetSpec, batch: Batch, seed: int) -> dict[str, float]:
    """For each layer of a row's network |learning rate x gradient| / |weights| before training."""
    name, changes = parts_of(row)
    rules = changed(recipe(name), changes)
    net = AlexNet(spec, rules, seed=seed).train()
    F.cross_entropy(net(batch.images, DropoutDraws(seed, 0)), batch.labels).backward()  # type: ignore[no-untyped-call]
    rates = learning_rates(rules, 0, rules.epochs)
    found = {}
    for layer in rules.layers:
        weight = net.get_parameter(f"{layer.name}.weight")
        assert weight.grad is not None
        found[layer.name] = rates[layer.name].weight * float(weight.grad.norm() / weight.detach().norm())
    return found


def slowest_change(row: str, spec: NetSpec, batch: Batch) -> float:
    """The relative change of the layer that changes least, as a geometric mean over `SEEDS`.

    Args:
        row: names recipe and changes; the images are those of the recipe "source2012" for all rows.
        spec: size of the network.
        batch: images and labels.
    """
    product = 1.0
    for seed in SEEDS:
        product *= min(relative_changes(row, spec, batch, seed).values())
    return float(f"{product ** (1 / len(SEEDS)):.3g}")
