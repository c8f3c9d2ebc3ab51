"""TODO-DOC pipeline.loader.settings (from pipeline.loader)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from pipeline.loader.augment import CROP, POSITIONS, STORED, Lighting, Mean
from pipeline.loader.order import Order

Device = Literal["cpu", "cuda"]
OnBadSample = Literal["stop", "skip"]
ANNOUNCED_AHEAD = 4  # batches between telling the kernel which bytes come next and handing them to DALI


def default_threads() -> int:
    """One more than there are cores, which keeps them busy while a thread waits for the others to end a batch (6 %
    faster on 2 cores); at most 8, as DALI advises 4 to 8 for one GPU."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


def check_device(device: str) -> None:
    """ValueError where it is "cuda" and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is cuda, but torch sees no CUDA device here; use --device cpu, or install a CUDA torch"
        )


@dataclass(frozen=True)
class LoaderSettings:
    """How the feed works. What changes its pictures: batch, seed, lighting, lighting_until, mean, positions, order,
    window_shards; and in a damaged set on_bad_sample."""

    batch: int = 128  # the global one, of all ranks together (P 5)
    seed: int = 0  # of order, crops, mirroring and lighting
    device: Device = "cpu"  # "cuda" is torch's current device
    threads: int = field(default_factory=default_threads)
    queue_depth: int = 2  # batches in work: one more than the one being waited for; a third gained nothing
    lighting: Lighting = field(default_factory=Lighting)
    lighting_until: int | None = None  # from this epoch on neither noise nor division (the 2012 run notes: 66 to 68)
    mean: Mean = "image"  # as the released code (convdata_jpeg.py:95)
    positions: int = POSITIONS  # crop offsets either way: 33 as the released code draws them, 32 for P 4.1's 2048
    order: Order = "global"  # "windowed" reads `window_shards` shards at a time, for sets that memory does not hold
    window_shards: int = 16
    on_bad_sample: OnBadSample = "stop"  # "skip": train on another instead; evaluation always stops
    max_bad_samples: int = 100  # as many are skipped; one more stops the feed
    hw_decoder_load: float = 0.65  # share of JPEGs for the GPU's decoder engines; DALI's default has changed over time

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "queue_depth", "window_shards", "max_bad_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be within 0 to 2**64 - 1")
        if self.device not in get_args(Device):
            raise ValueError(f"device is {self.device!r}; choose cpu or cuda")
        if self.mean not in get_args(Mean):
            raise ValueError(f"mean is {self.mean!r}; choose image or channel")
        if self.order not in get_args(Order):
            raise ValueError(f"order is {self.order!r}; choose global or windowed")
        if self.on_bad_sample not in get_args(OnBadSample):
            raise ValueError(f"on_bad_sample is {self.on_bad_sample!r}; choose stop or skip")
        if not 1 <= self.positions <= POSITIONS:
            raise ValueError(f"{self.positions} crop positions; a {CROP} crop of {STORED} has 1 to {POSITIONS}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load is {self.hw_decoder_load}; it is a share, 0 to 1")

    @property
    def made_ahead(self) -> int:
        """Batches that may be made, or read, before they are asked for: no measure of how fast the feed is."""
        return self.queue_depth + ANNOUNCED_AHEAD + 2

    def lighting_at(self, epoch: int) -> Lighting:
        """The lighting of `epoch`."""
        if self.lighting_until is not None and epoch >= self.lighting_until:
            return replace(self.lighting, coefficient=0.0)
        return self.lighting
