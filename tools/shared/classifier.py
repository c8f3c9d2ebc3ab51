"""A trained network for image files. Nothing but the checkpoint is needed: it holds the mean image and the class names.

from tools.shared.classifier import Classifier

classifier = Classifier.load("runs/sample/checkpoints/step-000000560")
for guess in classifier.classify(["photo.jpg"])[0]:
    print(f"{guess.probability:.1%} {guess.words}")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.alexnet import AlexNet
from model.checkpoint import load_data, load_model
from model.evaluation import class_probabilities
from model.recipe import RECIPES
from pipeline.loader.augment import Floats, mean_of
from pipeline.loader.settings import check_device
from pipeline.shards.settings import ResizeSettings
from tools.shared.checkpoint_data import eigenbasis_of_checkpoint, resize_settings
from tools.shared.image_files import image_views

VIEWS = (1, 10)
VIEWS_AT_ONCE = 80


@dataclass(frozen=True)
class Guess:
    """A class that an image may show.

    Attributes:
        label: position of the class.
        wnid: its id, for ImageNet the WordNet id.
        words: its names.
        probability: from 0 to 1.
    """

    label: int
    wnid: str
    words: str
    probability: float


class Classifier:
    """A trained network with its class names, its mean image and the resize settings of its training set.

    Attributes:
        model: the network, in evaluation mode.
        classes: [wnid, words] of each class; the position is the label.
        mean: what is subtracted from a crop, float32 (3, 224, 224).
        resize: how image files are resized.
    """

    def __init__(self, model: AlexNet, classes: list[list[str]], mean: Floats, resize: ResizeSettings) -> None:
        self.model, self.classes, self.mean, self.resize = model.eval(), classes, mean, resize

    @classmethod
    def load(cls, checkpoint: str | Path, device: str = "cpu") -> Classifier:
        """Loads a checkpoint of tools/train.py.

        Args:
            checkpoint: a folder step-... of a run.
            device: "cpu" or "cuda".

        Raises:
            ValueError: the folder holds no checkpoint or a damaged one, or there is no CUDA device.
        """
        check_device(device)
        path = Path(checkpoint)
        model = load_model(path, RECIPES)
        mean = mean_of(eigenbasis_of_checkpoint(path), model.recipe.mean)
        return cls(model.to(device), load_data(path).classes, mean, resize_settings(path))

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.model.parameters()).device

    def classify(self, files: Sequence[str | Path], views: int = 1, top: int = 5) -> list[list[Guess]]:
        """The `top` most probable classes of each image file, the most probable one first.

        Args:
            files: image files.
            views: 1 for the centre crop, 10 for ten views whose probabilities are averaged (paper section 4.1).
            top: number of classes; all classes if there are fewer.

        Raises:
            ValueError: a file is not an image.
        """
        found, order = self.probabilities(files, views).sort(dim=1, descending=True, stable=True)
        return [
            [Guess(n, self.classes[n][0], self.classes[n][1], value) for value, n in zip(values, labels, strict=True)]
            for values, labels in zip(found[:, :top].tolist(), order[:, :top].tolist(), strict=True)
        ]

    def probabilities(self, files: Sequence[str | Path], views: int = 1) -> Tensor:
        """Class probabilities (files, classes) float64 on the CPU. Arguments and errors are those of `classify`."""
        parts = [class_probabilities(self.model, images) for images in self._batches(files, views)]
        none = torch.empty(0, len(self.classes), dtype=torch.float64)
        return torch.cat([none, *(part.cpu() for part in parts if part is not None)])

    def features(self, files: Sequence[str | Path], layer: str = "fc7") -> Tensor:
        """Activations of one layer for the centre crop of each image file.

        They are taken after all operations that follow the layer, such as ReLU and pooling. Those of fc6 and fc7 are
        multiplied by the probability of being kept, as fc8 reads them (paper section 4.2).

        Args:
            files: image files.
            layer: a layer of the network, conv1 to fc8. fc8 gives the logits.

        Returns:
            float32 on the CPU: (files, units), or (files, feature maps, H, W) for a convolution; tower 0 comes first.

        Raises:
            ValueError: a file is not an image, or the network has no such layer.
        """
        names = [name for name, _ in self.model.named_children()]
        if layer not in names:
            raise ValueError(f"layer {layer!r}: this network has {', '.join(names)}")
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept.append(output.detach().cpu())

        hook = self.model.get_submodule(layer).register_forward_hook(keep)
        try:
            with torch.no_grad():
                for images in self._batches(files, 1):
                    self.model(images.flatten(0, 1))
        finally:
            hook.remove()
        return torch.cat(kept) if kept else torch.empty(0)

    def _batches(self, files: Sequence[str | Path], views: int) -> Iterator[Tensor]:
        """Yields the views of some of the files at a time, (N, views, 3, 224, 224) on the network's device."""
        if views not in VIEWS:
            raise ValueError(f"{views} views; choose 1 (the centre) or 10 (corners, centre and their mirror images)")
        at_once = VIEWS_AT_ONCE // views
        for start in range(0, len(files), at_once):
            paths = map(Path, files[start : start + at_once])
            images = np.stack([image_views(path, self.resize, self.mean, views) for path in paths])
            yield torch.from_numpy(images).to(self.device)
