"""The four-layer network behind Figure 1 of the paper: how much faster ReLU trains than tanh on CIFAR-10.

The paper (section 3.1 and the caption of Figure 1) names neither the network nor the learning rates. This is the
four-layer network of the public cuda-convnet example `layers-19pct.cfg`: three convolutions of 5 x 5 with 32, 32 and
64 feature maps, each followed by a pooling of 3 x 3 with stride 2 (maximum, mean, mean), and one fully connected layer.
As in the caption there is no regularisation of any kind: no weight decay, no dropout, no augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["relu", "tanh"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": functional.relu, "tanh": torch.tanh}
FEATURE_MAPS = (32, 32, 64)
SIDE = 32  # pixels of an image
TARGET_ERROR = 0.25  # training error of Figure 1


@dataclass(frozen=True)
class FourLayerSettings:
    """What one training of the four-layer network depends on.

    Attributes:
        activation: the nonlinearity after every convolution.
        learning_rate: of the weights; biases have twice that, as in `layer-params-19pct.cfg`.
        momentum: share of the velocity that a step keeps.
        batch: images of an optimizer step.
        window_steps: optimizer steps over which the training error is averaged.
        max_epochs: where a training ends that does not reach the target.
        seed: draws the weights and the order of the images.
    """

    activation: Activation
    learning_rate: float
    momentum: float = 0.9
    batch: int = 128
    window_steps: int = 98  # a quarter of an epoch of CIFAR-10
    max_epochs: float = 60.0
    seed: int = 1


@dataclass(frozen=True)
class ErrorCurve:
    """Training error over time.

    Attributes:
        settings: of the training.
        epochs: epochs at the middle of each window.
        errors: mean training error in each window, on images before they were trained on in that epoch.
        epochs_to_target: epochs until the error was `TARGET_ERROR`, interpolated between windows; None if never.
    """

    settings: FourLayerSettings
    epochs: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    epochs_to_target: float | None = None

    def with_window(self, epoch: float, error: float) -> ErrorCurve:
        """The curve with one more window; finds where it crosses the target."""
        reached = self.epochs_to_target
        if reached is None and error <= TARGET_ERROR:
            reached = epoch
            if self.errors:
                share = (self.errors[-1] - TARGET_ERROR) / (self.errors[-1] - error)
                reached = self.epochs[-1] + share * (epoch - self.epochs[-1])
        return replace(self, epochs=(*self.epochs, epoch), errors=(*self.errors, error), epochs_to_target=reached)


class FourLayerNet(nn.Module):
    """Maps mean-subtracted images (N, 3, 32, 32) of pixel values 0-255 to scores (N, classes)."""

    def __init__(self, activation: Activation, classes: int, seed: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        channels = (3, *FEATURE_MAPS)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels[n], channels[n + 1], 5, padding=2) for n in range(len(FEATURE_MAPS))
        )
        self.classifier = nn.Linear(FEATURE_MAPS[-1] * 4 * 4, classes)
        generator = torch.Generator().manual_seed(seed)
        stdevs = (0.0001, 0.01, 0.01, 0.1)  # layers-19pct.cfg
        for layer, stdev in zip([*self.convolutions, self.classifier], stdevs, strict=True):
            nn.init.normal_(layer.weight, std=stdev, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """The scores of the classes."""
        first, second, third = self.convolutions
        x = self.activation(functional.max_pool2d(first(images_nchw), 3, 2, ceil_mode=True))
        x = _mean_pool(self.activation(second(x)))
        x = _mean_pool(self.activation(third(x)))
        scores: Tensor = self.classifier(x.flatten(1))
        return scores


def _mean_pool(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, 2, ceil_mode=True)


def train_to_target(
    settings: FourLayerSettings, images_0_255: Tensor, labels: Tensor, on_step: Callable[[], None] = lambda: None
) -> ErrorCurve:
    """Trains until the training error is `TARGET_ERROR`, the epochs are over, or the loss is no finite number.

    Args:
        settings: of the training.
        images_0_255: all training images, uint8 (N, 3, 32, 32).
        labels: their classes, int64 (N,).
        on_step: called after every optimizer step.
    """
    layout = torch.channels_last  # half the CPU time of a step
    net = FourLayerNet(settings.activation, int(labels.max()) + 1, settings.seed)
    net = net.to(memory_format=layout)  # type: ignore[call-overload]
    groups = [
        {"params": [p for name, p in net.named_parameters() if name.endswith(kind)], "lr": factor}
        for kind, factor in (("weight", settings.learning_rate), ("bias", 2 * settings.learning_rate))
    ]
    optimizer = torch.optim.SGD(groups, momentum=settings.momentum)
    mean = images_0_255.float().mean(0)
    curve, wrong, steps_per_epoch = ErrorCurve(settings), 0, len(labels) // settings.batch
    for step, batch in enumerate(_batches(len(labels), settings), 1):
        scores = net((images_0_255[batch].float() - mean).contiguous(memory_format=layout))
        loss = functional.cross_entropy(scores, labels[batch])
        if not torch.isfinite(loss):
            return curve
        wrong += int((scores.argmax(1) != labels[batch]).sum())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        on_step()
        if step % settings.window_steps == 0:
            middle = (step - settings.window_steps / 2) / steps_per_epoch
            curve = curve.with_window(middle, wrong / (settings.window_steps * settings.batch))
            wrong = 0
            if curve.epochs_to_target is not None:
                return curve
    return curve


def _batches(images: int, settings: FourLayerSettings) -> Iterator[Tensor]:
    """The rows of each batch, in a new order each epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    left = round(settings.max_epochs * (images // settings.batch))
    while left > 0:
        order = torch.randperm(images, generator=generator)
        for start in range(0, images - settings.batch + 1, settings.batch)[:left]:
            yield order[start : start + settings.batch]
        left -= images // settings.batch
