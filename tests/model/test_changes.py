"""Changes of a recipe: what each one changes, the networks that they give, and which combinations are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest
import torch

from model.alexnet import AlexNet
from model.changes import CHANGES, changed
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.recipe import LAYERS, PAPER, SOURCE2012, Recipe, learning_rates
from model.shapes import TOWERS, NetSpec, layer_table, tower_slice
from model.trainer import train_step
from tests.model.test_alexnet import SMALL, images, in_lock_step
from tests.support.rank_jobs import Rows

TWO_TOWERS = [name for name in CHANGES if name != "one-tower"]


def base_of(name: str) -> Recipe:
    """The source's recipe, or the paper's if the source has this setting already."""
    try:
        changed(SOURCE2012, [name])
    except ValueError:
        return PAPER
    return SOURCE2012


def with_change(name: str) -> Recipe:
    return changed(base_of(name), [name])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("one-tower", 59_798_312),  # footnote 2 of the paper, by the layer sizes of run 145-half
        ("no-communication", 60_714_408),
        ("sixth-conv", 60_965_224 + 2 * 128 * (256 * 9 + 1)),
        ("no-conv3", 60_965_224 - 2 * 192 * (192 * 9 + 1)),  # conv4 reads both towers' 128 maps
        ("no-conv5", 60_965_224 - 2 * 128 * (192 * 9 + 1) + 2 * 2048 * 36 * 2 * 64),  # fc6 reads 192 maps, not 128
        ("no-fc7", 60_965_224 - 2 * 2048 * (4096 + 1)),
        ("non-overlapping-pooling", 60_965_224),
    ],
)
def test_networks_have_their_size(name: str, parameters: int) -> None:
    table = layer_table(NetSpec(), with_change(name))
    assert sum(s.weights + s.biases for s in table) == parameters


def test_every_change_that_names_no_layer_keeps_the_shapes() -> None:
    structural = {"one-tower", "no-communication", "sixth-conv", *(f"no-{layer}" for layer in LAYERS)}
    same = {name for name in CHANGES if layer_table(NetSpec(), with_change(name)) == layer_table(NetSpec())}
    assert same == set(CHANGES) - structural


def test_without_communication_fc6_and_fc7_are_as_large_as_with_it() -> None:
    """Towers meet in fc8 only. The weights of every fully connected layer are as many as those of 2012's network."""
    table = {s.name: s for s in layer_table(NetSpec(), with_change("no-communication"))}
    assert [s.name for s in table.values() if s.reads_both] == ["fc8"]
    assert (table["conv2"].out_channels, table["fc6"].out_channels) == (160, 4096)
    for s in layer_table(NetSpec())[5:7]:
        assert table[s.name].weights == s.weights


@pytest.mark.parametrize("name", ["no-conv2", "no-conv3", "no-conv4", "no-conv5", "no-fc6", "no-fc7"])
def test_one_layer_less_leaves_the_rest_as_it_was(name: str) -> None:
    """The layers behind read images of the same side, and towers still meet before what is then the third layer."""
    gone = name.removeprefix("no-")
    table = {s.name: s for s in layer_table(NetSpec(), with_change(name))}
    whole = {s.name: s for s in layer_table(NetSpec()) if s.name != gone}
    assert list(table) == list(whole)
    # except for fc7 without fc6, which reads the last feature maps themselves
    sides = {n: 6 if (n, gone) == ("fc7", "fc6") else s.in_side for n, s in whole.items()}
    assert {n: s.in_side for n, s in table.items()} == sides
    assert table["conv4" if gone == "conv3" else "conv3"].reads_both
    assert all(gone not in each.layers for each in with_change(name).learning_rates)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_recorded_and_trains(name: str) -> None:
    """Two steps of a small network, in training mode, change every parameter; the changed recipe survives JSON."""
    recipe = with_change(name)
    assert recipe.changes == (name,)
    assert json.loads(json.dumps(asdict(recipe)))["changes"] == [name]
    net = AlexNet(SMALL, recipe, seed=3)
    optimizer = Momentum2012(net.named_parameters(), recipe, learning_rates(recipe, 0, 90))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    batch = Rows(images(8).float(), torch.arange(8), 0, 0)
    for step in range(2):
        loss, _ = train_step(net, optimizer, batch, DropoutDraws(1, step))
        assert torch.isfinite(loss)
    assert set(before) == {f"{layer.name}.{kind}" for layer in recipe.layers for kind in ("weight", "bias")}
    assert all(not torch.equal(value, net.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", TWO_TOWERS)
def test_a_tower_on_each_rank_gives_what_both_on_one_give(name: str) -> None:
    """The same logits and gradients, whatever the change; each rank has its rows of a gradient."""
    recipe = with_change(name)
    whole = AlexNet(SMALL, recipe, seed=3).double()
    ranks = [AlexNet(SMALL, recipe, towers=(t,), seed=3).double() for t in TOWERS]
    x, draws = images(2), DropoutDraws(seed=5, step=7)
    one, two = whole(x, draws), in_lock_step(ranks, x, draws)
    assert torch.allclose(one, two, rtol=1e-10)
    for logits in (one, two):
        logits.square().sum().backward()
    for key, parameter in whole.named_parameters():
        assert parameter.grad is not None
        for tower, net in enumerate(ranks):
            if key in dict(net.named_parameters()):
                got, expected = net.get_parameter(key).grad, tower_slice(key, parameter.grad, tower)
                assert got is not None
                assert torch.allclose(got, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


def test_one_tower_is_the_plain_network_of_its_layers() -> None:
    """Its layers in a row, without groups; a rank cannot hold half of it."""
    net = AlexNet(SMALL, with_change("one-tower")).double().eval()
    assert [len(layer.towers) for layer in net.children()] == [1] * len(LAYERS)  # type: ignore[arg-type]
    assert list(net.segments) == ["conv1"]
    with pytest.raises(ValueError, match=r"towers \(0,\); a network of one tower cannot be divided"):
        AlexNet(SMALL, with_change("one-tower"), towers=(0,))


def test_unit_variance_divides_the_images_by_57_6() -> None:
    """The same as the plain network on divided images."""
    plain = AlexNet(SMALL, SOURCE2012).double().eval()
    scaled = AlexNet(SMALL, with_change("unit-variance")).double().eval()
    with torch.no_grad():
        assert torch.allclose(scaled(images(2)), plain(images(2) / 57.6), rtol=1e-9)


def test_settings_between_the_recipes_meet() -> None:
    """The changes that name the other recipe's setting give that setting."""
    paper = changed(PAPER, ["conv-sd-0.03", "bias-lr-2x", "lighting-source2012", "lrn-alpha-mean"])
    source = changed(SOURCE2012, ["conv-sd-0.01", "bias-lr-1x", "lighting-paper", "lrn-alpha-sum"])
    assert [layer.weight_sd for layer in paper.layers] == [layer.weight_sd for layer in SOURCE2012.layers]
    assert [layer.weight_sd for layer in source.layers] == [layer.weight_sd for layer in PAPER.layers]
    assert (paper.lrn, source.lrn) == (SOURCE2012.lrn, PAPER.lrn)
    assert (paper.lighting, source.lighting) == ("source2012", "paper")
    assert learning_rates(paper, 0, 90) == learning_rates(SOURCE2012, 0, 91)
    assert learning_rates(source, 0, 91) == learning_rates(PAPER, 0, 90)


def test_no_change_gives_the_recipe_itself() -> None:
    assert changed(SOURCE2012, []) == SOURCE2012
    unchanged = {field.name for field in fields(Recipe)} - {"changes", "input_scale"}
    scaled = with_change("unit-variance")
    assert all(getattr(scaled, name) == getattr(SOURCE2012, name) for name in unchanged)


def test_the_order_in_which_changes_are_named_does_not_matter() -> None:
    one, other = (changed(SOURCE2012, names) for names in (["tanh", "sixth-conv"], ["sixth-conv", "tanh"]))
    assert one == other
    assert one.layer("conv6").after == ("tanh",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["no-conv1"], "no change is called 'no-conv1'; choose from one-tower, "),
        (["tanh", "tanh"], "change tanh is given twice"),
        (["conv-sd-0.03"], "change conv-sd-0.03 changes nothing in recipe source2012; leave it out"),
        (["one-tower", "no-communication"], "another change undoes one-tower in recipe source2012 with one-tower, no-"),
        (["bias-0", "bias-0.1"], "change bias-0.1 changes nothing"),
    ],
)
def test_names_that_cannot_be_right_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(SOURCE2012, names)


def test_a_recipe_keeps_its_learning_rate_scale() -> None:
    assert changed(replace(SOURCE2012, learning_rate_scale=0.5), ["tanh"]).learning_rate_scale == 0.5
