"""A checkpoint without training, for tests that need one which knows its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.optim import Momentum2012
from model.recipe import learning_rates
from model.shapes import NetSpec
from pipeline import rgb_pca
from pipeline.shards.reader import open_shards
from tools.shared.checkpoint_data import data_record

WIDTH = 0.05


def save_untrained(path: Path, train: Path, width: float = WIDTH, brighter: float = 0.0) -> None:
    """Saves a network with starting weights for the classes of a train shard set, which has an eigenbasis.

    Args:
        path: a folder that is named like a checkpoint, step-000000560.
        train: the shard set.
        width: width of the network.
        brighter: added to the mean image, in pixel values 0-255.
    """
    shards = open_shards(train)
    basis = rgb_pca.load_for(shards)
    basis = replace(basis, mean=basis.mean + brighter, mean_image=basis.mean_image + np.float32(brighter))
    data = data_record(shards.manifest, basis)
    steps = checkpoint.optimizer_steps_of(path)
    model = AlexNet(NetSpec(len(data.classes), width), seed=steps)
    optimizer = Momentum2012(model.named_parameters(), model.recipe, learning_rates(model.recipe, 0, 1))
    state = replace(TrainState.start(), optimizer_steps=steps)
    checkpoint.save(path, model, optimizer, state, seed=0, data=data)
