"""What the record of tools/gpu_check.py says of a run before its checks."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version
from typing import Any

from pipeline.profiling.machine import describe_machine
from tools.shared.provenance import git_commit

PACKAGES = ("torch", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "numpy")  # torch's version names its CUDA


def describe(device: str, now: datetime) -> dict[str, Any]:
    """Date, device, machine (with the GPU driver), versions and commit."""
    return {
        "date": now.isoformat(timespec="seconds"),
        "device": device,
        "machine": describe_machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "git_commit": git_commit(),
    }
