"""What the time of a training step goes to, by torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

REST = "rest"  # rectification, dropout, casts, the loss
KINDS = {  # of work, by the outermost operator whose name has one of these in it
    "response normalisation": ("_ResponseNorm",),
    "convolutions": ("aten::conv", "ConvolutionBackward"),
    "fully connected": ("aten::linear", "AddmmBackward"),
    "pooling": ("aten::max_pool2d", "MaxPool2D"),
    "optimizer": ("Optimizer.step",),
}


def step_shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Shares, by kind and `REST`, of the time of the kernels that `step` launches on `device`, which it must wait for;
    of the operators' own time where that is the CPU. They add up to 1; where the device idled is not seen."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as picture:
        step()
    spent_us: dict[str, float] = defaultdict(float)
    for event in picture.events():
        # An operator's kernels are among it; an annotation's would be all between the first and the last of its range.
        kernels = [] if event.is_user_annotation else event.kernels
        own_us = sum(kernel.duration for kernel in kernels) if gpu else event.self_cpu_time_total
        spent_us[_kind(event)] += own_us
    return {kind: spent_us[kind] / sum(spent_us.values()) for kind in (*KINDS, REST)}


def _kind(event: Any) -> str:
    """That of the outermost operator around `event` that has one."""
    found = REST
    while event is not None:
        found = next((kind for kind, names in KINDS.items() if any(name in event.name for name in names)), found)
        event = event.cpu_parent
    return found
