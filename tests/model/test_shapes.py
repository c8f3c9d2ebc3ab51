"""Layer shapes: the counts of 2012, widths, the printed table, and rows of towers."""

from __future__ import annotations

import math

import pytest

from model.alexnet import AlexNet
from model.recipe import RECIPES, recipe
from model.shapes import TOWERS, NetSpec, format_table, layer_table

SMALL = NetSpec(classes=10, width=0.06)


def test_the_table_has_the_counts_of_2012() -> None:
    """Weights, biases, multiply-accumulate operations (MACs) and units of every layer, by hand from layers-145.cfg."""
    counts = {s.name: (s.out_side, s.weights, s.biases, s.macs, s.units) for s in layer_table(NetSpec())}
    assert counts == {
        "conv1": (55, 34_848, 96, 105_415_200, 290_400),
        "conv2": (27, 307_200, 256, 223_948_800, 186_624),
        "conv3": (13, 884_736, 384, 149_520_384, 64_896),
        "conv4": (13, 663_552, 384, 112_140_288, 64_896),
        "conv5": (13, 442_368, 256, 74_760_192, 43_264),
        "fc6": (1, 37_748_736, 4_096, 37_748_736, 4_096),
        "fc7": (1, 16_777_216, 4_096, 16_777_216, 4_096),
        "fc8": (1, 4_096_000, 1_000, 4_096_000, 1_000),
    }


def test_the_printed_table_ends_with_the_totals() -> None:
    """60,954,656 weights, 10,568 biases, 724,406,816 MACs and 659,272 units; all rows have the same number of cells."""
    lines = format_table(NetSpec()).splitlines()
    assert lines[-1].endswith("| 60,954,656 | 10,568 | 724,406,816 | 659,272 |")
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 8 + 1


def test_each_tower_has_its_parameters_of_2012() -> None:
    """Full width: tower 0, with fc8, has 32,531,112 parameters, tower 1 28,434,112, both together 60,965,224."""
    sizes = [sum(p.numel() for p in AlexNet(NetSpec(), towers=(tower,)).parameters()) for tower in TOWERS]
    assert sizes == [32_531_112, 28_434_112]
    assert sum(sizes) == sum(s.weights + s.biases for s in layer_table(NetSpec())) == 60_965_224


@pytest.mark.parametrize("name", RECIPES)
def test_module_and_table_agree(name: str) -> None:
    """The parameters of a narrow network have the counts of the table, too, and both recipes have the same table."""
    net = AlexNet(SMALL, recipe(name))
    table = layer_table(SMALL, recipe(name))
    assert table == layer_table(SMALL)
    counts = {f"{s.name}.{kind}": n for s in table for kind, n in (("weight", s.weights), ("bias", s.biases))}
    assert counts == {key: parameter.numel() for key, parameter in net.named_parameters()}


@pytest.mark.parametrize("width", [0.001, 0.1, 0.5, 1.0, 2.0])
def test_widths_scale_hidden_layers_in_fours(width: float) -> None:
    """Feature maps are a multiple of 4, at least 4, and within 2 of exact scaling; classes and image sizes stay."""
    for s, full in zip(layer_table(NetSpec(7, width)), layer_table(NetSpec(7)), strict=True):
        if s.name == "fc8":
            assert s.out_channels == 7
        else:
            assert s.out_channels % 4 == 0
            assert s.out_channels == 4 or abs(s.out_channels - width * full.out_channels) <= 2
        assert s.out_side == full.out_side


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"width": 0.0}, {"width": -1.0}, {"width": math.nan}])
def test_impossible_sizes_are_refused(wrong: dict[str, float]) -> None:
    """Classes below 1, and widths that are not positive numbers, raise an error that names them."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NetSpec(**wrong)  # type: ignore[arg-type]


def test_only_conv1_reaches_past_its_input() -> None:
    """Its 55th window reaches 3 pixels past the image (test_alexnet.py checks the side); other layers fit exactly."""
    conv1 = layer_table(NetSpec())[0]
    assert (conv1.out_side, conv1.overhang) == (55, 3)
    assert all(s.overhang == 0 for s in layer_table(NetSpec())[1:])
