"""What training does to one photograph: crops, mirroring, and the lighting noise in each convention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.loader.augment import Lighting, LightingConvention, draw, reference_train
from pipeline.rgb_pca import Eigenbasis, load_for
from pipeline.shards.reader import open_shards
from pipeline.shards.settings import ResizeSettings
from tools.shared.figures import plot
from tools.shared.image_files import stored_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 6  # images in a row
ROWS: dict[str, LightingConvention] = {
    "crops, mirroring": "none",
    "lighting, source2012": "source2012",
    "lighting, paper": "paper",
}


def augmented(pixels: np.ndarray, basis: Eigenbasis, convention: LightingConvention, count: int) -> list[np.ndarray]:
    """The training images of `count` epochs, with the mean added again, as uint8 (224, 224, 3).

    With noise, all images have the crop of the first one, so that they differ by the noise alone.
    """
    draws = [draw(0, epoch, np.zeros(1, np.int64)) for epoch in range(count)]
    images = []
    for one in draws:
        place = one if convention == "none" else draws[0]
        offsets, divisor = Lighting(convention).offsets_and_divisor(one.normals, basis)
        mean = basis.mean.astype(np.float32)[:, None, None]
        image = reference_train(pixels, place.top[0], place.left[0], place.mirror[0], offsets[0], divisor, mean) + mean
        images.append(np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(1, 2, 0))
    return images


def augmentations_figure(pixels: np.ndarray, basis: Eigenbasis) -> Figure:
    """Draws the stored image, the eigenbasis, and a row of training images for each of `ROWS`."""
    figure, axes = plot.subplots(1 + len(ROWS), COLUMNS, 9.0, 6.6)
    plot.show_image(axes[0, 0], pixels, "stored")
    _draw_basis(axes[0, 1:4], basis)
    plot.hide(axes[0, 4:])
    for row, (title, convention) in zip(axes[1:], ROWS.items(), strict=True):
        for number, (each, image) in enumerate(zip(row, augmented(pixels, basis, convention, COLUMNS), strict=True)):
            plot.show_image(each, image, title if number == 0 else f"epoch {number}")
    return figure


def _draw_basis(axes: np.ndarray, basis: Eigenbasis) -> None:
    """Draws each eigenvector as three bars, with the standard deviation along it."""
    each: Axes
    for number, each in enumerate(axes):
        each.bar(["R", "G", "B"], basis.eigenvectors[:, number], color=["#d1495b", "#2a9d8f", "#3b6ea5"])
        each.axhline(0, color="#222222", linewidth=0.8)
        each.set_ylim(-1, 1)
        each.set_title(f"p{number + 1}, sd {basis.stdevs[number]:.1f}", fontsize=7)
        each.tick_params(labelsize=6)


def draw_figure(photograph: Path, shards: Path, out: Path) -> str:
    """Draws the augmentations of a photograph with the eigenbasis of a training set. Returns what was drawn."""
    opened = open_shards(shards)
    pixels = stored_pixels(photograph, ResizeSettings())
    plot.save(augmentations_figure(pixels, load_for(opened)), out)
    return f"augmentations of {photograph}"
