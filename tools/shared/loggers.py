"""Where the metrics of a run go. `Logger` has two methods; docs/tracking.md shows how to add another one.

A run always writes JSON lines to metrics.jsonl. `--tensorboard` also writes event files for TensorBoard, `--prometheus`
a file for Prometheus (`tools.shared.prometheus`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model.runs import RunFolder
from tools.shared.prometheus import Prometheus

TENSORBOARD_FOLDER = "tensorboard"  # in the folder of the run


class Logger(Protocol):
    """Receives the metrics and images of a run, on the first rank."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Receives metrics by name, with the number of optimizer steps as `step`. The `verdict` is a text.

        Raises:
            OSError: they cannot be written. Training continues, with a warning.
        """

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Receives an image, uint8 (H, W, 3). Raises OSError as `log`."""


def loggers_of(folder: RunFolder, step: int, tensorboard: bool, prometheus: bool) -> list[Logger]:
    """The loggers of a run that goes on from optimizer step `step`; JSON lines first. Add others here."""
    others: list[Logger] = [TensorBoard(folder.path, step)] if tensorboard else []
    return [JsonLines(folder), *others, *([Prometheus(folder)] if prometheus else [])]


class JsonLines:
    """Writes metrics.jsonl. Images are not stored."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends the metrics as one line."""
        self._folder.log(dict(line))

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Does nothing."""


class TensorBoard:
    """Writes event files into the folder of the run.

    Args:
        folder: of the run.
        step: optimizer steps from which the run goes on. TensorBoard hides what an earlier process logged after it.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError("--tensorboard: not installed; run: pip install -e '.[tensorboard]'") from error
        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge)  # type: ignore[no-untyped-call]

    def log(self, line: Mapping[str, Any]) -> None:
        """Writes every number as a curve."""
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, line["step"])  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Writes the image."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")  # type: ignore[no-untyped-call]
