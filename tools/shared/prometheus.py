"""Metrics of a run as a file for Prometheus: metrics.prom in the folder of the run, for a textfile collector.

The file has the last value of each metric, with the run's name as a label, and is replaced atomically.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.runs import RunFolder, write_atomically

METRICS_PROM = "metrics.prom"  # in the folder of the run

# For each entry of a line of metrics: the name of the metric, and what it is.
METRICS = {
    "step": ("alexnet_optimizer_steps", "Optimizer steps so far."),
    "epoch": ("alexnet_epoch", "Epoch, from 0."),
    "loss": ("alexnet_loss", "Mean loss on training images over the last logging interval."),
    "top1": ("alexnet_top1_ratio", "Share of training images classified correctly over the last logging interval."),
    "lr": ("alexnet_learning_rate", "Learning rate of the weights of fc8."),
    "images_per_s": ("alexnet_images_per_second", "Throughput of training over the last logging interval."),
    "wait_share": ("alexnet_wait_ratio", "Share of the time in which training waited for images."),
    "au_estimate": ("alexnet_au_estimate_ratio", "Estimate of accelerator utilisation: 1 - alexnet_wait_ratio."),
    "input_bound": ("alexnet_input_bound", "1 if the run has become input-bound since it began, 0 otherwise."),
    "val_loss": ("alexnet_validation_loss", "Loss of the last validation."),
    "val_top1": ("alexnet_validation_top1_ratio", "Top-1 accuracy of the last validation."),
    "val_top5": ("alexnet_validation_top5_ratio", "Top-5 accuracy of the last validation."),
    "stall_au": ("alexnet_stall_au_ratio", "Accelerator utilisation in the stall report."),
    "stall_supply": ("alexnet_stall_supply_images_per_second", "Throughput of the loader alone in the stall report."),
    "stall_demand": ("alexnet_stall_demand_images_per_second", "Throughput of replayed batches in the stall report."),
    "stall_together": ("alexnet_stall_together_images_per_second", "Throughput of training in the stall report."),
}
VERDICT = ("alexnet_stall_verdict", "1 for the verdict of the stall report.")


class Prometheus:
    """Writes metrics.prom. Images, and metrics that are not in `METRICS`, are not stored.

    Args:
        folder: of the run. Its metrics.jsonl gives the first values, so that a resumed run keeps them.

    Raises:
        ValueError: prometheus-client is not installed.
    """

    def __init__(self, folder: RunFolder) -> None:
        try:
            from prometheus_client import CollectorRegistry, Gauge, generate_latest
        except ModuleNotFoundError as error:
            raise ValueError("--prometheus: not installed; run: pip install -e '.[prometheus]'") from error
        self._path, self._run = folder.path / METRICS_PROM, folder.path.name
        self._registry, self._gauge, self._text_of = CollectorRegistry(), Gauge, generate_latest
        self._gauges = dict[str, Any]()
        for line in folder.metrics():
            self._set(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """Writes the file again. Metrics that the line does not have keep their values."""
        self._set(line)
        write_atomically(self._path, self._text_of(self._registry).decode())

    def _set(self, line: Mapping[str, Any]) -> None:
        for entry in METRICS:
            if isinstance(line.get(entry), (int, float)):
                self._of(*METRICS[entry], "run").labels(self._run).set(line[entry])
        if "verdict" in line:
            verdicts = self._of(*VERDICT, "run", "verdict")
            verdicts.clear()  # of an earlier report
            verdicts.labels(self._run, line["verdict"]).set(1)

    def _of(self, name: str, text: str, *labels: str) -> Any:
        """The gauge of this name, made when it is first set: a metric without a value is not in the file."""
        if name not in self._gauges:
            self._gauges[name] = self._gauge(name, text, labels, registry=self._registry)
        return self._gauges[name]

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Does nothing."""
