"""The network and the training of Figure 1."""

from __future__ import annotations

import torch

from model.four_layers import ACTIVATIONS, ErrorCurve, FourLayerNet, FourLayerSettings, train_to_target


def images_and_labels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of two classes, which differ in their brightness."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return (noise + 150 * labels[:, None, None, None]).to(torch.uint8), labels


def test_the_network_has_the_sizes_of_its_source():
    """Three convolutions of 5 x 5 and one fully connected layer on 4 x 4 activations."""
    net = FourLayerNet("relu", classes=10, seed=1)
    sizes = {name: tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")}
    assert list(sizes.values()) == [(32, 3, 5, 5), (32, 32, 5, 5), (64, 32, 5, 5), (10, 1024)]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_activations_give_different_networks_with_the_same_weights():
    relu, tanh = (FourLayerNet(name, classes=10, seed=1) for name in ACTIVATIONS)
    assert all(torch.equal(one, other) for one, other in zip(relu.parameters(), tanh.parameters(), strict=True))
    images = 255 * torch.rand(2, 3, 32, 32)
    assert not torch.equal(relu(images), tanh(images))


def test_training_stops_at_the_target_and_is_the_same_again():
    images, labels = images_and_labels(128)
    settings = FourLayerSettings("relu", learning_rate=0.001, batch=32, window_steps=2, max_epochs=20)
    curve, again = (train_to_target(settings, images, labels) for _ in range(2))
    assert curve == again
    assert curve.epochs_to_target is not None and curve.epochs[-2] < curve.epochs_to_target <= curve.epochs[-1]
    assert curve.errors[-1] <= 0.25 < min(curve.errors[:-1])


def test_training_ends_with_its_epochs_or_at_an_infinite_loss():
    images, labels = images_and_labels(64)[0], torch.arange(64) % 10
    for learning_rate in (1e-9, 1e9):
        settings = FourLayerSettings("tanh", learning_rate, batch=32, window_steps=1, max_epochs=3)
        curve = train_to_target(settings, images, labels)
        assert curve.epochs_to_target is None and len(curve.errors) <= 6


def test_the_target_is_interpolated_between_windows():
    curve = ErrorCurve(FourLayerSettings("relu", 0.001)).with_window(1.0, 0.35).with_window(2.0, 0.15)
    assert curve.epochs_to_target == 1.5
    assert curve.with_window(3.0, 0.1).epochs_to_target == 1.5
