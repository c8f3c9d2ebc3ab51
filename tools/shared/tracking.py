"""Sends what a run measures to its loggers: metrics, learning rates, an example batch, the kernels of the first layer.

A logger that fails gives one warning, and training continues: what JSON lines miss is written with the next line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from model.batch import Batch
from model.recipe import LayerLearningRates
from pipeline.diagnosis.accounting import verdict_kind
from tools.shared.figures.kernels import kernel_sheet
from tools.shared.loggers import Logger

SHOWN_IMAGES = 16  # of the first batch
COLUMNS = 4
B = TypeVar("B", bound=Batch)


class Tracking:
    """The loggers of a run on its first rank; on other ranks there are none, and every call does nothing.

    Args:
        loggers: the first one writes metrics.jsonl; the others also get learning rates by layer, and images.
        warn: prints a warning.
    """

    def __init__(self, loggers: list[Logger], warn: Callable[[str], None]) -> None:
        self._loggers, self._others, self._warn = loggers, loggers[1:], warn
        self._failed: set[int] = set()

    def log(self, line: Mapping[str, Any]) -> None:
        """Sends a line of metrics to all loggers."""
        self._send(self._loggers, lambda logger: logger.log(line))

    def learning_rates(self, step: int, rates: Mapping[str, LayerLearningRates]) -> None:
        """Sends the learning rates of every layer."""
        values = {
            f"lr/{layer}.{kind}": getattr(rate, kind) for layer, rate in rates.items() for kind in ("weight", "bias")
        }
        self._send(self._others, lambda logger: logger.log({"step": step, **values}))

    def kernels(self, step: int, conv1_weight: Tensor) -> None:
        """Sends the kernels of the first layer, of the towers that this rank holds."""
        if self._others:
            sheet = kernel_sheet(conv1_weight.detach().float().cpu().numpy())
            self._send(self._others, lambda logger: logger.image("conv1", step, sheet))

    def with_example(self, batches: Iterator[B], mean_rgb: np.ndarray, step: int) -> Iterator[B]:
        """Yields the batches, and sends some images of the first one, with the mean (3,) added again."""
        for number, batch in enumerate(batches):
            if number == 0 and self._others:
                sheet = image_sheet(batch.images[:SHOWN_IMAGES].float().cpu().numpy(), mean_rgb)
                self._send(self._others, partial(_send_batch, step, sheet))
            yield batch

    def report(self, step: int, record: Mapping[str, Any]) -> None:
        """Sends the kind of verdict, AU and throughputs of a stall report, whose own file is stall.json."""
        figures = {f"stall_{name}": record[name] for name in ("au", "supply", "demand", "together")}
        line = {"step": step, "verdict": verdict_kind(record["verdict"]), **figures}
        self._send(self._others, lambda logger: logger.log(line))

    def _send(self, loggers: list[Logger], call: Callable[[Logger], None]) -> None:
        for logger in loggers:
            try:
                call(logger)
            except OSError as error:
                if id(logger) not in self._failed:
                    self._failed.add(id(logger))
                    self._warn(f"{error}; training continues")


def _send_batch(step: int, sheet: np.ndarray, logger: Logger) -> None:
    logger.image("batch", step, sheet)


def wait_share(line: Mapping[str, Any], global_batch: int) -> float:
    """The share of the time in which training waited for images, from a line of metrics.

    On an asynchronous device it is the share of gaps between steps, otherwise that of waits on the host.
    """
    loop_s = global_batch / line["images_per_s"]
    return float(min(1.0, line.get("device_gap_s", line["wait_s"]) / loop_s))


def image_sheet(images_nchw: np.ndarray, mean_rgb: np.ndarray) -> np.ndarray:
    """Images side by side in rows of `COLUMNS`, uint8 (H, W, 3).

    Args:
        images_nchw: float32 (N, 3, H, W), pixel values 0-255 with the mean subtracted.
        mean_rgb: (3,) mean pixel values, which are added again.
    """
    pixels = np.clip(np.rint(images_nchw + mean_rgb[:, None, None]), 0, 255).astype(np.uint8)
    count, channels, height, width = pixels.shape
    rows = -(-count // COLUMNS)
    padded = np.zeros((rows * COLUMNS, channels, height, width), np.uint8)
    padded[:count] = pixels
    grid = padded.reshape(rows, COLUMNS, channels, height, width).transpose(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, COLUMNS * width, channels)
