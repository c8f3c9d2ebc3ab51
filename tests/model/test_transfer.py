"""Starting from another network's layers, and frozen layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.recipe import RECIPES, SOURCE2012, learning_rates
from model.shapes import TOWERS, NetSpec, tower_slice
from model.trainer import train_step
from model.transfer import frozen_layers, layers_of, load_layers, skip_frozen_gradients, with_frozen
from tests.support.rank_jobs import global_batch

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")


def optimizer_of(model: AlexNet) -> Momentum2012:
    return Momentum2012(model.named_parameters(), model.recipe, learning_rates(model.recipe, 0, 8))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a network with 7 classes, whose biases are not those of the start."""
    model, path = AlexNet(NetSpec(7, 0.05), seed=1), tmp_path / "step-000000001"
    for parameter in model.parameters():
        parameter.data += 0.5
    checkpoint.save(path, model, optimizer_of(model), replace(TrainState.start(), optimizer_steps=1), seed=1)
    return path


@pytest.mark.parametrize(("layer_set", "taken"), [("convolutions", 5), ("all-but-fc8", 7)])
@pytest.mark.parametrize("towers", [TOWERS, (0,), (1,)])
def test_named_layers_are_taken_and_all_others_stay(layer_set: str, taken: int, towers: tuple[int, ...], saved: Path):
    """Into a network with another number of classes, of both towers or of one."""
    source = dict(checkpoint.load_model(saved, RECIPES).named_parameters())
    model, before = (AlexNet(NetSpec(5, 0.05), towers=towers, seed=2) for _ in range(2))
    load_layers(saved, model, layer_set)
    names = layers_of(SOURCE2012, layer_set)
    assert len(names) == taken
    for (name, now), start in zip(model.named_parameters(), before.parameters(), strict=True):
        expected = start
        if name.partition(".")[0] in names:
            expected = torch.cat([tower_slice(name, source[name], tower) for tower in towers])
        assert torch.equal(now, expected), name


def test_frozen_layers_stay_and_the_others_learn_as_before():
    """Leaving out their gradients changes nothing."""
    recipe = with_frozen(SOURCE2012, "convolutions")
    assert frozen_layers(recipe) == CONVOLUTIONS and frozen_layers(SOURCE2012) == ()
    for epoch in (0, 50, 90):
        rates = learning_rates(recipe, epoch, 91)
        assert all((rates[name].weight, rates[name].bias) == (0, 0) for name in CONVOLUTIONS)
        assert rates["fc6"] == learning_rates(SOURCE2012, epoch, 91)["fc6"]
    ended = []
    for skip in (False, True):
        model = AlexNet(NetSpec(5, 0.05), recipe, seed=3)
        start = {name: parameter.clone() for name, parameter in model.named_parameters()}
        optimizer = optimizer_of(model)
        if skip:
            skip_frozen_gradients(model)
        for step in range(2):
            train_step(model, optimizer, global_batch(0, step), DropoutDraws(1, step))
        now = dict(model.named_parameters())
        assert {name.partition(".")[0] for name in now if torch.equal(now[name], start[name])} == {*CONVOLUTIONS}
        ended.append(now)
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_a_network_of_another_size_is_refused(saved: Path):
    with pytest.raises(ValueError, match=r"a network of width 0.05, expected 0.1; add --width 0.05$"):
        load_layers(saved, AlexNet(NetSpec(5, 0.1)), "convolutions")
    (saved / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.safetensors: damaged"):
        load_layers(saved, AlexNet(NetSpec(5, 0.05)), "convolutions")
