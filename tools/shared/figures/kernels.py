"""The kernels of the first layer by tower, as in Figure 3 of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tools.shared.figures import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS_PER_TOWER = 3  # Figure 3 shows three rows of 16 kernels for each GPU
GAP = 1  # pixels between kernels


def kernel_sheet(kernels: np.ndarray) -> np.ndarray:
    """The kernels of one tower side by side.

    Args:
        kernels: (C, 3, K, K) weights of the tower's C feature maps. Each kernel is scaled on its own, so that grey is
            0 and its largest absolute weight is black or white.

    Returns:
        uint8 (H, W, 3), with white gaps.
    """
    count, _, side, _ = kernels.shape
    columns = -(-count // ROWS_PER_TOWER)
    pitch = side + GAP
    sheet = np.full((ROWS_PER_TOWER * pitch - GAP, columns * pitch - GAP, 3), 255, np.uint8)
    largest = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)
    scaled = np.divide(kernels, largest, out=np.zeros_like(kernels), where=largest > 0)
    pixels = np.rint(127.5 * (1 + scaled)).astype(np.uint8).transpose(0, 2, 3, 1)
    for number, kernel in enumerate(pixels):
        top, left = pitch * (number // columns), pitch * (number % columns)
        sheet[top : top + side, left : left + side] = kernel
    return sheet


def kernels_figure(weight: Tensor, towers: int, title: str) -> Figure:
    """Draws the kernels of each tower.

    Args:
        weight: of conv1, (towers * C, 3, K, K).
        towers: how many towers the weight holds.
        title: of the figure.
    """
    sheets = [kernel_sheet(part.numpy(force=True)) for part in weight.float().chunk(towers)]
    figure, axes = plot.subplots(towers, 1, 6.4, 0.4 + 1.35 * towers)
    for tower, (sheet, each) in enumerate(zip(sheets, axes[:, 0], strict=True)):
        plot.show_image(each, sheet, f"tower {tower}")
    figure.suptitle(title, fontsize=8)
    return figure


def draw(checkpoint: Path, out: Path) -> str:
    """Draws Figure 3 of a checkpoint. Returns a line that says what was drawn."""
    from model.checkpoint import load_model
    from model.recipe import RECIPES

    model = load_model(checkpoint, RECIPES)
    weight = model.get_parameter("conv1.weight")
    plot.save(kernels_figure(weight, len(model.towers), f"First-layer kernels of {checkpoint.name}"), out)
    return f"{len(weight)} kernels of {checkpoint}"
