"""The network of a checkpoint as a program of torch.export, and the check that it computes the same."""

from __future__ import annotations

from io import BytesIO

import torch
from torch import Tensor, nn

from model.alexnet import AlexNet
from pipeline.loader.augment import Floats

CHECKED_BATCHES = (1, 3)  # other sizes than that of the example, with which the network is traced
MOST_IMAGES = 65_536  # of a batch; torch.export needs a limit


class CropClassifier(nn.Module):
    """The network with the subtraction of the mean in front: crops with pixel values 0-255 in, logits out.

    Args:
        model: both towers.
        mean: float32 (3, 224, 224).
    """

    mean: Tensor

    def __init__(self, model: AlexNet, mean: Floats) -> None:
        super().__init__()
        self.model = model.eval()
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, crops_0_255: Tensor) -> Tensor:
        """Logits (N, classes) of RGB crops, float32 (N, 3, 224, 224) with pixel values 0-255."""
        logits: Tensor = self.model(crops_0_255 - self.mean)
        return logits


def export(network: CropClassifier, extra_files: dict[str, str]) -> bytes:
    """The bytes of a .pt2 file, for batches of any size up to `MOST_IMAGES`.

    Args:
        network: on the CPU.
        extra_files: texts that are stored in the file, by name.
    """
    size = torch.export.Dim("images", min=1, max=MOST_IMAGES)
    with torch.no_grad():
        program = torch.export.export(network, (_crops(2, seed=0),), dynamic_shapes=({0: size},))
    file = BytesIO()
    torch.export.save(program, file, extra_files=extra_files)
    return file.getvalue()


def largest_difference(network: CropClassifier, data: bytes) -> float:
    """The largest difference of a logit between the network and the exported program in `data`, on random crops."""
    program = torch.export.load(BytesIO(data)).module()
    with torch.no_grad():
        batches = [_crops(images, seed=images) for images in CHECKED_BATCHES]
        return max(float((network(crops) - program(crops)).abs().max()) for crops in batches)


def _crops(images: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (images, 3, 224, 224), generator=generator).float()
