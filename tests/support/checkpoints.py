"""A checkpoint without training, for tests that need one which knows its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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


def save_untrained(path: Path, train: Path) -> None:
    """Saves a network with starting weights for the classes of a train shard set, which has an eigenbasis.

    Args:
        path: a folder that is named like a checkpoint, step-000000560.
        train: the shard set.
    """
    shards = open_shards(train)
    data = data_record(shards.manifest, rgb_pca.load_for(shards))
    steps = checkpoint.optimizer_steps_of(path)
    model = AlexNet(NetSpec(len(data.classes), WIDTH), seed=steps)
    optimizer = Momentum2012(model.named_parameters(), model.recipe, learning_rates(model.recipe, 0, 1))
    state = replace(TrainState.start(), optimizer_steps=steps)
    checkpoint.save(path, model, optimizer, state, seed=0, data=data)
