"""Watches the JPEG engines of this process's GPU while something runs, and judges whether they decode images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.hardware_decoder import EngineWatch, engine_reader

Result = TypeVar("Result")


def with_engines_watched(
    device: torch.device, settings: LoaderSettings, work: Callable[[], Result]
) -> tuple[Result, dict[str, Any]]:
    """Calls `work`, which decodes images with `settings`, and watches the JPEG engines meanwhile.

    Args:
        device: the device that decodes.
        settings: of the loader.
        work: what decodes images.

    Returns:
        The result of `work`, and `hardware_decoding` for a record: `active` and `because`; empty on the CPU.
    """
    if device.type != "cuda":
        return work(), {}
    reader = engine_reader(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    with EngineWatch(reader) as watch:
        result = work()
    return result, {"hardware_decoding": asdict(watch.judged(settings.hw_decoder_load))}
