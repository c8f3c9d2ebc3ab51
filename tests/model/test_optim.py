"""The optimizer of 2012 against a plain NumPy twin and against torch.optim.SGD."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from model.alexnet import AlexNet
from model.optim import Momentum2012, fused_step, set_learning_rates
from model.recipe import LAYERS, SOURCE2012, LayerLearningRates, learning_rates
from model.shapes import NetSpec
from tests.support.launches import META, Launches

EVEN = dict.fromkeys(LAYERS, LayerLearningRates(0.01, 0.01))


def small_net(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"conv1": nn.Linear(4, 3), "fc8": nn.Linear(3, 2)}).double()


def give_gradients(net: nn.Module, step: int) -> None:
    draws = np.random.default_rng(step)
    for parameter in net.parameters():
        parameter.grad = torch.from_numpy(draws.normal(size=parameter.shape))


def changing_learning_rates(step: int) -> dict[str, LayerLearningRates]:
    """Learning rates that fall, other ones for biases, and conv1 frozen for a while."""
    now = dict.fromkeys(LAYERS, LayerLearningRates(0.1 / (1 + step // 6), 0.2 / (1 + step // 9)))
    return now | ({"conv1": LayerLearningRates(0.0, 0.0)} if 8 <= step < 12 else {})


def test_the_rule_is_that_of_the_paper() -> None:
    """Twenty steps with changing learning rates e: v <- m v - e g - e d w, w <- w + v, in NumPy; only weights decay."""
    net = small_net()
    twin = {name: parameter.detach().numpy().copy() for name, parameter in net.named_parameters()}
    velocity = {name: np.zeros_like(values) for name, values in twin.items()}
    optimizer = Momentum2012(net.named_parameters(), SOURCE2012, changing_learning_rates(0))
    for step in range(20):
        now = changing_learning_rates(step)
        set_learning_rates(optimizer, now)
        give_gradients(net, step)
        optimizer.step()
        for name, parameter in net.named_parameters():
            layer, kind = name.split(".")
            learning_rate, decay = (now[layer].weight, 0.0005) if kind == "weight" else (now[layer].bias, 0.0)
            if learning_rate > 0:
                assert parameter.grad is not None
                velocity[name] = (
                    0.9 * velocity[name] - learning_rate * parameter.grad.numpy() - learning_rate * decay * twin[name]
                )
                twin[name] = twin[name] + velocity[name]
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), twin[name], rtol=1e-12)
        np.testing.assert_allclose(optimizer.velocities()[name].numpy(), velocity[name], rtol=1e-12)


@pytest.mark.parametrize("changes", [False, True])
def test_it_equals_torch_sgd_until_a_learning_rate_changes(changes: bool) -> None:
    """With constant learning rates both rules give the same parameters; after a change they differ."""
    ours, theirs = small_net(), small_net()
    decays = replace(SOURCE2012, bias_decay=SOURCE2012.weight_decay)
    optimizer = Momentum2012(ours.named_parameters(), decays, EVEN)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
    for step in range(12):
        if changes and step == 6:
            set_learning_rates(optimizer, dict.fromkeys(LAYERS, LayerLearningRates(0.001, 0.001)))
            sgd.param_groups[0]["lr"] = 0.001
        for net in (ours, theirs):
            give_gradients(net, step)
        optimizer.step()
        sgd.step()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) is not changes for a, b in pairs)


def test_learning_rate_zero_freezes_bit_for_bit() -> None:
    """A frozen layer keeps parameters and velocities, and needs no gradient; other layers change."""
    net = small_net()
    optimizer = Momentum2012(net.named_parameters(), SOURCE2012, EVEN)
    give_gradients(net, 0)
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in (*net.named_parameters(), *prefixed(optimizer))}
    set_learning_rates(optimizer, EVEN | {"conv1": LayerLearningRates(0.0, 0.0)})
    for step in (1, 2):
        give_gradients(net, step)
        net["conv1"].weight.grad = None
        optimizer.step()
    after = dict((*net.named_parameters(), *prefixed(optimizer)))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == ("conv1" in name)


def prefixed(optimizer: Momentum2012) -> list[tuple[str, torch.Tensor]]:
    return [(f"velocity {name}", tensor) for name, tensor in optimizer.velocities().items()]


def test_a_learning_parameter_without_gradient_is_a_bug() -> None:
    """A missing gradient is an error, not 0."""
    net = small_net()
    optimizer = Momentum2012(net.named_parameters(), SOURCE2012, EVEN)
    with pytest.raises(AssertionError, match=r"conv1\.weight has a learning rate but no gradient"):
        optimizer.step()


def test_groups_have_name_learning_rate_and_decay() -> None:
    """Each parameter is a group; `set_learning_rates` sets weights and biases of each layer separately."""
    net = small_net()
    optimizer = Momentum2012(net.named_parameters(), SOURCE2012, EVEN)
    set_learning_rates(optimizer, EVEN | {"fc8": LayerLearningRates(0.5, 0.25)})
    seen = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert seen == {
        "conv1.weight": (0.01, 0.0005),
        "conv1.bias": (0.01, 0.0),
        "fc8.weight": (0.5, 0.0005),
        "fc8.bias": (0.25, 0.0),
    }


def test_velocities_restore_a_run() -> None:
    """A new optimizer with copied parameters and velocities continues the run exactly."""
    first = small_net()
    optimizer = Momentum2012(first.named_parameters(), SOURCE2012, EVEN)
    for step in range(3):
        give_gradients(first, step)
        optimizer.step()
    second = small_net(seed=1)
    second.load_state_dict(first.state_dict())
    resumed = Momentum2012(second.named_parameters(), SOURCE2012, EVEN)
    for name, velocity in resumed.velocities().items():
        velocity.copy_(optimizer.velocities()[name])
    for net, its in ((first, optimizer), (second, resumed)):
        give_gradients(net, 3)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---- other devices than the CPU ---------------------------------------------------------------------------------


def test_the_fused_step_is_the_same_rule():
    """Weights agree to 2e-15 in float64 over 20 steps in which learning rates fall and a layer is frozen."""
    net, fused = small_net(), small_net()
    optimizer = Momentum2012(net.named_parameters(), SOURCE2012, changing_learning_rates(0))
    velocities = {name: torch.zeros_like(each) for name, each in fused.named_parameters()}
    for step in range(20):
        set_learning_rates(optimizer, changing_learning_rates(step))
        give_gradients(net, step)
        give_gradients(fused, step)
        optimizer.step()
        for group in optimizer.param_groups:
            name = group["name"]
            if group["lr"]:
                rule = group["lr"], group["momentum"], group["weight_decay"]
                fused_step([fused.get_parameter(name)], [velocities[name]], *rule)
    for name, expected in net.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name), expected, rtol=2e-15, atol=2e-15)
        torch.testing.assert_close(velocities[name], optimizer.velocities()[name], rtol=1e-13, atol=1e-15)


def test_a_step_is_one_launch_for_each_learning_rate_and_decay():
    """Two for the network of 2012: weights and biases. Each reads three tensors and writes two: 5 passes. A frozen
    layer is left out, and a missing gradient is still a bug."""
    model = AlexNet(NetSpec(width=0.05)).to(META)
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 91))
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    with Launches() as launches:
        optimizer.step()
    assert launches.operators == {"_fused_sgd_": 2} and launches.bytes == 5 * 4 * numbers
    set_learning_rates(optimizer, learning_rates(SOURCE2012, 75, 91))  # conv1 is frozen
    held = sum(parameter.numel() for parameter in model.conv1.parameters())
    with Launches() as launches:
        optimizer.step()
    assert launches.operators == {"_fused_sgd_": 2} and launches.bytes == 5 * 4 * (numbers - held)
    model.fc8.bias.grad = None
    with pytest.raises(AssertionError, match=r"fc8\.bias has a learning rate but no gradient"):
        optimizer.step()
