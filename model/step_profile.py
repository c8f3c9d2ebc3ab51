"""Shares of a training step's time by kind of work (convolutions, LRN, ...), measured with torch's profiler.

LRN is local response normalisation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

REST = "rest"  # ReLU, dropout, casts, the loss
KINDS = {  # kind of work: parts of operator names; the outermost operator that matches decides
    "local response normalisation": ("ResponseNorm",),  # the autograd function of model.response_norm, and its backward
    "convolutions": ("aten::conv", "ConvolutionBackward"),
    "fully connected": ("aten::linear", "AddmmBackward"),
    "pooling": ("aten::max_pool2d", "MaxPool2D"),
    "optimizer": ("Optimizer.step",),
}


def step_shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Shares of the time of `step` by kind of work.

    Args:
        step: runs one or more training steps and waits for the device.
        device: on CUDA the kernels' time is counted, otherwise the operators' own CPU time. Idle time of the device is
            not counted.

    Returns:
        A share for every key of `KINDS` and for `REST`; they add up to 1.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recording:
        step()
    spent_us: dict[str, float] = defaultdict(float)
    for event in recording.events():
        # An operator lists the kernels that it launched. A user annotation would list all kernels between the first and
        # the last of its range, and they would be counted twice.
        kernels = [] if event.is_user_annotation else event.kernels
        own_us = sum(kernel.duration for kernel in kernels) if gpu else event.self_cpu_time_total
        spent_us[_kind(event)] += own_us
    return {kind: spent_us[kind] / sum(spent_us.values()) for kind in (*KINDS, REST)}


def _kind(event: Any) -> str:
    """The kind of the outermost operator around `event` that has one."""
    found = REST
    while event is not None:
        found = next((kind for kind, names in KINDS.items() if any(name in event.name for name in names)), found)
        event = event.cpu_parent
    return found
