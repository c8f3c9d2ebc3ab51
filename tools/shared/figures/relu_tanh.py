"""Figure 1 of the paper, run for real: training error of a four-layer network with ReLU and with tanh.

The paper chose the learning rate of each activation so that training was as fast as possible. Here every learning rate
of a list trains for a few epochs, and the one with the lowest training error then trains to the target.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from model.four_layers import (
    ACTIVATIONS,
    SIDE,
    TARGET_ERROR,
    Activation,
    ErrorCurve,
    FourLayerSettings,
    train_to_target,
)
from pipeline.imagenet.item_reader import ItemReader
from pipeline.imagenet.source import open_source
from tools.shared.cli import Progress
from tools.shared.figures import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Comparison:
    """How the two activations are compared.

    Attributes:
        learning_rates: that are tried for each activation.
        trial_epochs: how long each of them is tried.
        max_epochs: where the training with the best one ends if it does not reach the target.
        images: how many images of the source are used, spread over its classes; 0 for all.
        seed: draws the weights and the order of the images.
    """

    learning_rates: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.004)
    trial_epochs: float = 2.0
    max_epochs: float = 60.0
    images: int = 0
    seed: int = 1


def read_images(source: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of the train split of a folder of 32 x 32 images.

    Args:
        source: in any layout that make_shards reads.
        count: how many images, at equal distances in the listing; 0 for all.

    Returns:
        Images, uint8 (N, 3, 32, 32), and labels, int64 (N,).

    Raises:
        ValueError: an image has another size, or the source has no train split.
    """
    listing = open_source(source).listing("train")
    total = len(listing.items)
    chosen = range(total) if not count else np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    images, labels = np.empty((len(chosen), 3, SIDE, SIDE), np.uint8), np.empty(len(chosen), np.int64)
    with ItemReader() as reader, Progress("reading", len(chosen)) as progress:
        for row, number in enumerate(chosen):
            item = listing.items[number]
            with Image.open(BytesIO(reader.read(item))) as image:
                if image.size != (SIDE, SIDE):
                    found = "{} x {}".format(*image.size)
                    raise ValueError(
                        f"{item.file}: {found} pixels, expected {SIDE} x {SIDE}; name a folder of CIFAR-10"
                    )
                images[row], labels[row] = np.asarray(image.convert("RGB")).transpose(2, 0, 1), item.label
            progress(1)
    return torch.from_numpy(images), torch.from_numpy(labels)


def compare(rules: Comparison, images_0_255: torch.Tensor, labels: torch.Tensor) -> dict[Activation, list[ErrorCurve]]:
    """Trains both activations. For each, the curves of all trials, then the curve to the target as the last one."""

    def trained(settings: FourLayerSettings, what: str) -> ErrorCurve:
        total = round(settings.max_epochs * (len(labels) // settings.batch))
        name = f"{settings.activation}, {what}, learning rate {settings.learning_rate:g}"
        with Progress(name, total, unit="step") as progress:
            return train_to_target(settings, images_0_255, labels, lambda: progress(1))

    curves: dict[Activation, list[ErrorCurve]] = {}
    for activation in ACTIVATIONS:
        window = min(98, max(1, len(labels) // 128 // 4))
        common: dict[str, Any] = {"activation": activation, "seed": rules.seed, "window_steps": window}
        trials = [
            trained(FourLayerSettings(learning_rate=rate, max_epochs=rules.trial_epochs, **common), "trial")
            for rate in rules.learning_rates
        ]
        best = min(trials, key=lambda curve: curve.errors[-1] if curve.errors else 1.0).settings.learning_rate
        final = trained(FourLayerSettings(learning_rate=best, max_epochs=rules.max_epochs, **common), "to the target")
        curves[activation] = [*trials, final]
    return curves


def ratio_of(curves: dict[Activation, list[ErrorCurve]]) -> float | None:
    """Epochs of tanh over epochs of ReLU until the target; None if one did not reach it."""
    relu, tanh = (curves[name][-1].epochs_to_target for name in ("relu", "tanh"))
    return tanh / relu if relu and tanh else None


def record_of(rules: Comparison, curves: dict[Activation, list[ErrorCurve]], images: int) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "comparison": asdict(rules),
        "images": images,
        "target_error": TARGET_ERROR,
        "ratio_of_epochs": ratio_of(curves),
        "curves": {name: [asdict(curve) for curve in each] for name, each in curves.items()},
    }


def curves_of(record: dict[str, Any]) -> dict[Activation, list[ErrorCurve]]:
    """The curves that `record_of` has written; the inverse of it."""
    return {name: [_curve_of(one) for one in each] for name, each in record["curves"].items()}


def _curve_of(one: dict[str, Any]) -> ErrorCurve:
    settings = FourLayerSettings(**one["settings"])
    return ErrorCurve(settings, tuple(one["epochs"]), tuple(one["errors"]), one["epochs_to_target"])


def relu_tanh_figure(curves: dict[Activation, list[ErrorCurve]]) -> Figure:
    """Draws the training error of both activations against epochs, ReLU solid and tanh dashed as in the paper."""
    figure, axes = plot.subplots(1, 1, 5.4, 3.6)
    axis = axes[0, 0]
    for name, each in curves.items():
        curve, dashes = each[-1], {"relu": "-", "tanh": "--"}[name]
        label = f"{name}, learning rate {curve.settings.learning_rate:g}"
        axis.plot(curve.epochs, [100 * error for error in curve.errors], dashes, color="#222222", label=label)
    axis.axhline(100 * TARGET_ERROR, color="#d1495b", linewidth=0.8)
    axis.set(xlabel="epochs", ylabel="training error, %", ylim=(0, 80), xlim=(0, None))
    axis.legend(frameon=False)
    if (ratio := ratio_of(curves)) is not None:
        axis.set_title(
            f"To {TARGET_ERROR:.0%} training error, tanh takes {ratio:.1f} times the epochs of ReLU", fontsize=8
        )
    return figure
