"""The network: a plain NumPy twin, one tower on each of two ranks against both on one, and starting weights."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.alexnet import AlexNet, Layer
from model.dropout import DropoutDraws
from model.recipe import RECIPES, Recipe, recipe
from model.shapes import TOWERS, NetSpec, layer_table, tower_slice
from tests.model.plain_lrn import plain_lrn_across_maps, plain_lrn_within_map

Array = NDArray[np.float64]
SMALL = NetSpec(classes=10, width=0.06)


def images(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, 224, 224, generator=generator, dtype=torch.float64) - 0.5) * 255


def layer_of(net: AlexNet, name: str) -> Layer:
    layer = net.get_submodule(name)
    assert isinstance(layer, Layer)
    return layer


def test_other_inputs_and_towers_are_refused() -> None:
    """Images of another size, towers that no rank holds, and training without masks raise errors that name them."""
    with pytest.raises(ValueError, match=r"\(2, 3, 227, 227\); expected \(N, 3, 224, 224\)"):
        AlexNet(SMALL)(torch.zeros(2, 3, 227, 227))
    with pytest.raises(ValueError, match=r"towers \(1, 0\)"):
        AlexNet(SMALL, towers=(1, 0))
    with pytest.raises(ValueError, match="training needs DropoutDraws"):
        AlexNet(SMALL)(torch.zeros(1, 3, 224, 224))


# --- plain twin -----------------------------------------------------------------------------------


def plain_windows(x: Array, size: int, stride: int, fill: float) -> list[list[Array]]:
    """Windows of (N, C, S, S). If pixels remain behind the last window, there is one more, which reads `fill` past the
    edge."""
    side = x.shape[2]
    count = 1 + -(-(side - size) // stride)
    wide = np.full((*x.shape[:2], side + size, side + size), fill)
    wide[:, :, :side, :side] = x
    starts = [i * stride for i in range(count)]
    return [[wide[:, :, i : i + size, j : j + size] for j in starts] for i in starts]


def plain_conv(x: Array, weight: Array, bias: Array, stride: int, pad: int) -> Array:
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows = plain_windows(x, weight.shape[2], stride, 0.0)
    per_pixel = [[np.tensordot(window, weight, ((1, 2, 3), (1, 2, 3))) + bias for window in row] for row in rows]
    return np.array(per_pixel).transpose(2, 3, 0, 1)


def plain_pool(x: Array) -> Array:
    return np.array([[w.max((2, 3)) for w in row] for row in plain_windows(x, 3, 2, -np.inf)]).transpose(2, 3, 0, 1)


def plain_logits(net: AlexNet, recipe: Recipe, x: Array) -> Array:
    """The network at test, tower by tower, in the order of layers-145.cfg or of the paper."""

    def parameters(layer: str, tower: int) -> tuple[Array, Array]:
        pair = [
            tower_slice(f"{layer}.{kind}", net.state_dict()[f"{layer}.{kind}"], tower) for kind in ("weight", "bias")
        ]
        return pair[0].numpy(), pair[1].numpy()

    def relu(a: Array) -> Array:
        return np.maximum(a, 0)

    towers = []
    for t in TOWERS:
        a = plain_conv(x, *parameters("conv1", t), 4, 0)
        if recipe.name == "source2012":
            a = relu(plain_pool(plain_lrn_across_maps(a, recipe.lrn)))
        else:
            a = plain_pool(plain_lrn_across_maps(relu(a), recipe.lrn))
        a = plain_lrn_across_maps(relu(plain_conv(a, *parameters("conv2", t), 1, 2)), recipe.lrn)
        if recipe.lrn_within_map is not None:
            a = plain_lrn_within_map(a, recipe.lrn_within_map)
        towers.append(plain_pool(a))
    both = np.concatenate(towers, 1)
    towers = []
    for t in TOWERS:
        a = relu(plain_conv(both, *parameters("conv3", t), 1, 1))
        a = relu(plain_conv(a, *parameters("conv4", t), 1, 1))
        towers.append(plain_pool(relu(plain_conv(a, *parameters("conv5", t), 1, 1))))
    both = np.concatenate(towers, 1).reshape(len(x), -1)
    for layer in ("fc6", "fc7"):
        pairs = [parameters(layer, t) for t in TOWERS]
        both = np.concatenate([0.5 * relu(both @ weight.T + bias) for weight, bias in pairs], 1)
    weight, bias = parameters("fc8", 0)
    return both @ weight.T + bias


@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_a_plain_twin(name: str) -> None:
    """Both recipes, in float64. The twin cuts windows one by one, rounds their number up as layer.py:1004 does, and
    normalises in plain loops."""
    net = AlexNet(SMALL, recipe(name)).double().eval()
    x = images(2)
    with torch.no_grad():
        got = net(x).numpy()
    expected = plain_logits(net, recipe(name), x.numpy())
    assert np.ptp(expected, axis=0).min() > 0
    np.testing.assert_allclose(got, expected, rtol=1e-10)


# --- one tower on each rank -----------------------------------------------------------------------


def in_lock_step(nets: list[AlexNet], x: Tensor, draws: DropoutDraws | None) -> Tensor:
    """Runs two ranks in one process, segment by segment, and joins their activations in between."""
    scale = nets[0].recipe.input_scale
    halves = [net.run_segment("conv1", x * scale, draws) for net in nets]
    for first in list(nets[0].segments)[1:-1]:
        both = torch.cat(halves, 1)
        halves = [net.run_segment(first, both, draws) for net in nets]
    return nets[0].run_segment("fc8", torch.cat(halves, 1), draws)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("training", [True, False])
def test_two_ranks_with_a_tower_each_are_one_rank_with_both(name: str, training: bool) -> None:
    """The same seed gives the same logits and gradients, with dropout; each rank has its rows of a gradient."""
    whole = AlexNet(SMALL, recipe(name), seed=3).double().train(training)
    ranks = [AlexNet(SMALL, recipe(name), towers=(t,), seed=3).double().train(training) for t in TOWERS]
    x, draws = images(2), DropoutDraws(seed=5, step=7) if training else None
    one, two = whole(x, draws), in_lock_step(ranks, x, draws)
    assert torch.allclose(one, two, rtol=1e-10)
    direction = torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (one * direction).sum().backward()
    (two * direction).sum().backward()
    for key, parameter in whole.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        for tower, net in enumerate(ranks):
            if key in dict(net.named_parameters()):
                got, expected = net.get_parameter(key).grad, tower_slice(key, parameter.grad, tower)
                assert got is not None
                assert torch.allclose(got, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


def test_exchange_is_called_where_towers_meet() -> None:
    """In order, with this rank's activations. Without tower 0 the result is that of the exchange before fc8."""
    net = AlexNet(SMALL, towers=(1,)).eval()
    seen: list[tuple[str, int]] = []

    def alone(x: Tensor, name: str) -> Tensor:
        seen.append((name, x.shape[1]))
        return torch.cat([x, x], 1)

    with torch.no_grad():
        last = net(images(1).float(), exchange=alone)
    channels = {s.name: s.out_channels for s in layer_table(SMALL)}
    assert seen == [
        (name, channels[of]) for name, of in (("conv3", "conv2"), ("fc6", "conv5"), ("fc7", "fc6"), ("fc8", "fc7"))
    ]
    assert last.shape == (1, 2 * channels["fc7"])
    assert not hasattr(net, "fc8")


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_starts_as_its_rows_of_the_whole(tower: int) -> None:
    """Bit for bit, whether or not the rank holds the other tower; fc8 has no rows on tower 1."""
    whole, alone = AlexNet(SMALL, seed=9).state_dict(), AlexNet(SMALL, towers=(tower,), seed=9).state_dict()
    for name, values in whole.items():
        piece = tower_slice(name, values, tower)
        assert torch.equal(alone[name], piece) if len(piece) else name not in alone
    for name, values in whole.items():
        assert torch.equal(torch.cat([tower_slice(name, values, t) for t in TOWERS]), values)


@pytest.mark.parametrize(("width", "gain"), [(1.0, 1.0), (0.25, 2.0)])
@pytest.mark.parametrize("name", RECIPES)
def test_the_start_has_the_recipe_s_spread_and_biases(name: str, width: float, gain: float) -> None:
    """Weights are normal with mean 0 and the recipe's standard deviation; biases are its constant. At a quarter of the
    width a unit reads a quarter of the feature maps, and the standard deviation doubles, except in conv1, which reads
    the image."""
    start = AlexNet(NetSpec(classes=20, width=width), recipe(name)).state_dict()
    for layer in recipe(name).layers:
        weight, bias = start[f"{layer.name}.weight"], start[f"{layer.name}.bias"]
        sd = layer.weight_sd * (1.0 if layer.name == "conv1" else gain)
        near = 5 / math.sqrt(weight.numel())  # five standard errors
        assert abs(float(weight.mean())) < near * sd
        assert float(weight.std()) == pytest.approx(sd, rel=near)
        assert float((weight.abs() < sd).float().mean()) == pytest.approx(0.6827, abs=near)
        assert torch.equal(bias, torch.full_like(bias, layer.bias))


def test_starts_differ_by_seed_tower_and_layer() -> None:
    """Seeds, towers and layers all have different starting weights."""
    a, b = AlexNet(SMALL, seed=0).state_dict(), AlexNet(SMALL, seed=1).state_dict()
    for name, values in a.items():
        if name.endswith("weight"):
            assert not torch.equal(values, b[name])
            first, second = tower_slice(name, values, 0), tower_slice(name, values, 1)
            assert name == "fc8.weight" or not torch.equal(first, second)
    assert not torch.equal(a["conv3.weight"].flatten()[:100], a["conv4.weight"].flatten()[:100])


# --- dropout and memory layout -------------------------------------------------------------------


def test_training_zeroes_outputs_and_test_halves_them() -> None:
    """fc6 in training: dropped units are 0, and the others are not rescaled. At test all units are halved."""
    layer = layer_of(AlexNet(SMALL).double(), "fc6")
    x = torch.randn(6, layer.weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = DropoutDraws(seed=4, step=0)
    full = torch.relu(x @ layer.weight.T + layer.bias)
    masks = torch.cat([draws.keep("fc6", t, 6, layer.shape.out_channels, 0.5, torch.device("cpu")) for t in TOWERS], 1)
    assert torch.allclose(layer(x, draws), full * masks)
    assert torch.allclose(layer.eval()(x, None), 0.5 * full)


def test_channels_last_gives_the_same_numbers() -> None:
    """The memory layout changes speed, but not logits or gradients."""
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = AlexNet(SMALL).double().to(memory_format=layout)
        net(images(2).contiguous(memory_format=layout), DropoutDraws(0, 0)).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10 * float(a.abs().max())) for a, b in zip(*grads, strict=True))
