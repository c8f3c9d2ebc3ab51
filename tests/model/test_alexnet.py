"""The network: counts of 2012, a plain twin in NumPy, and one tower on each of two ranks against both on one."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.alexnet import AlexNet, Layer
from model.dropout import DropoutDraws, splitmix64
from model.recipe import PAPER, RECIPES, SOURCE2012, Norm, Recipe, recipe
from model.response_norm import norm_across_maps, norm_within_map
from model.shapes import TOWERS, NetSpec, format_table, layer_table, tower_slice

Array = NDArray[np.float64]
SMALL = NetSpec(classes=10, width=0.06)
STRONG = Norm(size=5, alpha=0.3, beta=0.75, k=1.5)  # normalises so much that a mistake shows


def images(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, 224, 224, generator=generator, dtype=torch.float64) - 0.5) * 255


def layer_of(net: AlexNet, name: str) -> Layer:
    layer = net.get_submodule(name)
    assert isinstance(layer, Layer)
    return layer


# --- counts ---------------------------------------------------------------------------------------


def test_the_table_has_the_counts_of_2012() -> None:
    """Weights, biases, MACs and units of every layer, worked out by hand from layers-145.cfg."""
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
    """Totals are 60,954,656 weights, 10,568 biases, 724,406,816 MACs, 659,272 units; cells fill every row."""
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
    """At another width too, parameters have the counts of the table, and both recipes have one table."""
    net = AlexNet(SMALL, recipe(name))
    table = layer_table(SMALL, recipe(name))
    assert table == layer_table(SMALL)
    counts = {f"{s.name}.{kind}": n for s in table for kind, n in (("weight", s.weights), ("bias", s.biases))}
    assert counts == {key: parameter.numel() for key, parameter in net.named_parameters()}


@pytest.mark.parametrize("width", [0.001, 0.1, 0.5, 1.0, 2.0])
def test_widths_scale_hidden_layers_in_fours(width: float) -> None:
    """Maps are a multiple of 4, at least 4, within 2 of exact scaling; classes and image stay."""
    for s, full in zip(layer_table(NetSpec(7, width)), layer_table(NetSpec(7)), strict=True):
        if s.name == "fc8":
            assert s.maps == 7
        else:
            assert s.maps % 4 == 0
            assert s.maps == 4 or abs(s.maps - width * full.maps) <= 2
        assert s.out_side == full.out_side


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"width": 0.0}, {"width": -1.0}, {"width": math.nan}])
def test_impossible_sizes_are_refused(wrong: dict[str, float]) -> None:
    """Classes below 1 and widths that are not positive numbers never build a network."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NetSpec(**wrong)  # type: ignore[arg-type]


def test_other_inputs_and_towers_are_refused() -> None:
    """Images of another side, and towers that are not a rank's, are named in the error."""
    with pytest.raises(ValueError, match=r"\(2, 3, 227, 227\); expected \(N, 3, 224, 224\)"):
        AlexNet(SMALL)(torch.zeros(2, 3, 227, 227))
    with pytest.raises(ValueError, match=r"towers \(1, 0\)"):
        AlexNet(SMALL, towers=(1, 0))
    with pytest.raises(ValueError, match="training needs DropoutDraws"):
        AlexNet(SMALL)(torch.zeros(1, 3, 224, 224))


# --- plain twin -----------------------------------------------------------------------------------


def plain_windows(x: Array, size: int, stride: int, fill: float) -> list[list[Array]]:
    """Windows of (N, C, S, S), as many as begin inside and one more where pixels are left; `fill` beyond the edge."""
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


def plain_norm(x: Array, norm: Norm) -> Array:
    """The formula of P 3.3, map by map, with alpha on every term."""
    out = np.empty_like(x)
    for i in range(x.shape[1]):
        near = range(max(0, i - norm.size // 2), min(x.shape[1], i + norm.size // 2 + 1))
        out[:, i] = x[:, i] / (norm.k + norm.alpha * sum(x[:, j] ** 2 for j in near)) ** norm.beta
    return out


def plain_map_norm(x: Array, norm: Norm) -> Array:
    out, half = np.empty_like(x), norm.size // 2
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = x[:, :, max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
            out[:, :, i, j] = x[:, :, i, j] / (norm.k + norm.alpha * (window**2).sum((2, 3))) ** norm.beta
    return out


def plain_logits(net: AlexNet, recipe: Recipe, x: Array) -> Array:
    """The network at test, tower by tower, in the order that layers-145.cfg or the paper gives."""
    source = recipe.name == "source2012"

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
        a = relu(plain_pool(plain_norm(a, recipe.norm))) if source else plain_pool(plain_norm(relu(a), recipe.norm))
        a = plain_norm(relu(plain_conv(a, *parameters("conv2", t), 1, 2)), recipe.norm)
        if recipe.map_norm is not None:
            a = plain_map_norm(a, recipe.map_norm)
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
    """Both recipes, in float64: windows cut one by one, rounded up as layer.py:1004 does, norms in plain loops."""
    net = AlexNet(SMALL, recipe(name)).double().eval()
    x = images(2)
    with torch.no_grad():
        got = net(x).numpy()
    expected = plain_logits(net, recipe(name), x.numpy())
    assert np.ptp(expected, axis=0).min() > 0
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_only_conv1_reaches_past_its_input() -> None:
    """Its 55th window reads 3 pixels beyond the image (the twin above says on which side); all others fit exactly."""
    conv1 = layer_table(NetSpec())[0]
    assert (conv1.out_side, conv1.overhang) == (55, 3)
    assert all(s.overhang == 0 for s in layer_table(NetSpec())[1:])


# --- response normalisation -----------------------------------------------------------------------


@pytest.mark.parametrize("maps", [1, 2, 4, 9])
def test_norm_across_maps_stays_in_its_tower(maps: int) -> None:
    """Each tower is normalised as if it were alone, by the formula of P 3.3 in plain loops."""
    x = torch.randn(2, 2 * maps, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(maps))
    got = norm_across_maps(x, STRONG, towers=2).numpy()
    alone = [plain_norm(half.numpy(), STRONG) for half in x.split(maps, dim=1)]
    np.testing.assert_allclose(got, np.concatenate(alone, 1), rtol=1e-12)


@pytest.mark.parametrize("side", [1, 3, 7])
def test_norm_within_map_is_the_average_pool_form(side: int) -> None:
    """x / (k + scale * mean over 5x5)^beta, with pixels beyond the edge counted as 0; also the plain loops."""
    x = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    got = norm_within_map(x, STRONG)
    pooled = torch.nn.functional.avg_pool2d(x.square(), 5, 1, 2, count_include_pad=True)
    assert torch.allclose(got, x / (STRONG.k + 25 * STRONG.alpha * pooled) ** STRONG.beta, rtol=1e-12)
    np.testing.assert_allclose(got.numpy(), plain_map_norm(x.numpy(), STRONG), rtol=1e-12)


def test_recipes_of_the_norm_in_the_words_of_torch() -> None:
    """Torch divides alpha by the window, as the source did: 1e-4 is the source, the paper read literally needs 5e-4."""
    x = 30 * torch.randn(2, 48, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for norm, alpha in ((SOURCE2012.norm, 1e-4), (PAPER.norm, 5e-4)):
        expected = torch.nn.functional.local_response_norm(x, 5, alpha, 0.75, 2.0)
        assert torch.allclose(norm_across_maps(x, norm, towers=1), expected, rtol=1e-12)
    assert SOURCE2012.map_norm is not None
    expected = x / (1 + 1e-3 * torch.nn.functional.avg_pool2d(x.square(), 5, 1, 2)) ** 0.75
    assert torch.allclose(norm_within_map(x, SOURCE2012.map_norm), expected, rtol=1e-12)


def test_gradients_of_the_norms_are_their_derivatives() -> None:
    """The closed form agrees with finite differences, in both layouts of memory."""
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        assert torch.autograd.gradcheck(lambda a: norm_across_maps(a, STRONG, 2), (leaf,))
        assert torch.autograd.gradcheck(lambda a: norm_within_map(a, STRONG), (leaf,))


def test_norm_of_half_precision_squares_in_full() -> None:
    """Responses of 300, whose squares float16 cannot hold, are normalised, and stay float16."""
    x = torch.full((1, 8, 3, 3), 300.0, dtype=torch.float16)
    for norm in (norm_across_maps(x, STRONG, 2), norm_within_map(x, STRONG)):
        assert norm.dtype == torch.float16
        assert 0 < norm.min() <= norm.max() < 300


# --- one tower on each rank -----------------------------------------------------------------------


def in_lock_step(nets: list[AlexNet], x: Tensor, draws: DropoutDraws | None) -> Tensor:
    """Two ranks played in one process: segment by segment, with their maps joined in between."""
    halves = [net.run_segment("conv1", x, draws) for net in nets]
    for first in ("conv3", "fc6", "fc7"):
        both = torch.cat(halves, 1)
        halves = [net.run_segment(first, both, draws) for net in nets]
    return nets[0].run_segment("fc8", torch.cat(halves, 1), draws)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("training", [True, False])
def test_two_ranks_with_a_tower_each_are_one_rank_with_both(name: str, training: bool) -> None:
    """Same seed, same logits and same gradients, dropout included; the pieces of a gradient join to the whole."""
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
    """In order, with this rank's maps; without tower 0 the result is what the exchange before fc8 gave."""
    net = AlexNet(SMALL, towers=(1,)).eval()
    seen: list[tuple[str, int]] = []

    def alone(x: Tensor, name: str) -> Tensor:
        seen.append((name, x.shape[1]))
        return torch.cat([x, x], 1)

    with torch.no_grad():
        last = net(images(1).float(), exchange=alone)
    maps = {s.name: s.maps for s in layer_table(SMALL)}
    assert seen == [
        (name, maps[of]) for name, of in (("conv3", "conv2"), ("fc6", "conv5"), ("fc7", "fc6"), ("fc8", "fc7"))
    ]
    assert last.shape == (1, 2 * maps["fc7"])
    assert not hasattr(net, "fc8")


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_starts_as_its_rows_of_the_whole(tower: int) -> None:
    """Bit for bit, whatever the rank holds; fc8 has no rows on tower 1."""
    whole, alone = AlexNet(SMALL, seed=9).state_dict(), AlexNet(SMALL, towers=(tower,), seed=9).state_dict()
    for name, values in whole.items():
        piece = tower_slice(name, values, tower)
        assert torch.equal(alone[name], piece) if len(piece) else name not in alone
    for name, values in whole.items():
        assert torch.equal(torch.cat([tower_slice(name, values, t) for t in TOWERS]), values)


@pytest.mark.parametrize(("width", "gain"), [(1.0, 1.0), (0.25, 2.0)])
@pytest.mark.parametrize("name", RECIPES)
def test_the_start_has_the_recipe_s_spread_and_biases(name: str, width: float, gain: float) -> None:
    """Weights are normal around 0 with the recipe's standard deviation, biases are its constant. At a quarter of the
    width a unit reads a quarter of the maps, and weights spread twice as wide; conv1 reads the image at any width."""
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
    """Another seed gives other weights; towers and layers do not share theirs."""
    a, b = AlexNet(SMALL, seed=0).state_dict(), AlexNet(SMALL, seed=1).state_dict()
    for name, values in a.items():
        if name.endswith("weight"):
            assert not torch.equal(values, b[name])
            first, second = tower_slice(name, values, 0), tower_slice(name, values, 1)
            assert name == "fc8.weight" or not torch.equal(first, second)
    assert not torch.equal(a["conv3.weight"].flatten()[:100], a["conv4.weight"].flatten()[:100])


# --- dropout --------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_a_rank_s_masks_are_rows_of_the_whole_batch() -> None:
    """Rows [a:b] drawn by a rank are those rows of the mask of the global batch."""
    whole = DropoutDraws(seed=1, step=2).keep("fc6", 0, 40, 33, 0.5, CPU)
    for first, rows in ((0, 10), (10, 30), (39, 1)):
        part = DropoutDraws(1, 2, first_row=first, global_batch=40).keep("fc6", 0, rows, 33, 0.5, CPU)
        assert torch.equal(part, whole[first : first + rows])
    with pytest.raises(ValueError, match=r"rows 30..41 of a batch of 40"):
        DropoutDraws(1, 2, first_row=30, global_batch=40).keep("fc6", 0, 11, 33, 0.5, CPU)


def test_masks_are_fair_and_all_different() -> None:
    """Half of all units stay; seed, step, layer and tower each give masks that agree no more than chance."""
    keys = [(0, 0, "fc6", 0), (1, 0, "fc6", 0), (0, 1, "fc6", 0), (0, 0, "fc7", 0), (0, 0, "fc6", 1), (1, 1, "fc7", 1)]
    masks = [DropoutDraws(seed, step).keep(layer, t, 200, 500, 0.5, CPU) for seed, step, layer, t in keys]
    chance = pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(200 * 500))
    for i, mask in enumerate(masks):
        assert float(mask.float().mean()) == chance
        assert all(float((mask == other).float().mean()) == chance for other in masks[:i])
    again = DropoutDraws(0, 0).keep("fc6", 0, 200, 500, 0.5, CPU)
    assert torch.equal(again, masks[0])


def test_training_zeroes_outputs_and_test_halves_them() -> None:
    """fc6 in training: dropped units are 0, the others are not rescaled; at test all are half of their value."""
    layer = layer_of(AlexNet(SMALL).double(), "fc6")
    x = torch.randn(6, layer.weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = DropoutDraws(seed=4, step=0)
    full = torch.relu(x @ layer.weight.T + layer.bias)
    masks = torch.cat([draws.keep("fc6", t, 6, layer.shape.maps, 0.5, CPU) for t in TOWERS], 1)
    assert torch.allclose(layer(x, draws), full * masks)
    assert torch.allclose(layer.eval()(x, None), 0.5 * full)


def test_splitmix64_is_the_published_generator() -> None:
    """First outputs of its reference implementation from the states 0 and 1234567."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317


# --- layout ---------------------------------------------------------------------------------------


def test_channels_last_gives_the_same_numbers() -> None:
    """Memory layout changes speed, not logits or gradients."""
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = AlexNet(SMALL).double().to(memory_format=layout)
        net(images(2).contiguous(memory_format=layout), DropoutDraws(0, 0)).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10 * float(a.abs().max())) for a, b in zip(*grads, strict=True))
