"""Where figures were measured: without it they cannot be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil


def describe_machine() -> dict[str, Any]:
    """Cores (that this process may use, and all), CPU model, bytes of RAM, kernel, GPUs."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cores_of_machine": os.cpu_count(),
        "cpu": cpu_model_name(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "gpus": describe_gpus(),
    }


def describe_gpus() -> list[str]:
    """Name, memory and driver of each GPU, as NVIDIA's driver tells; none where there is no such driver."""
    question = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(question, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return told.splitlines()


def cpu_model_name() -> str:
    """As /proc/cpuinfo names it; the architecture where it names none (ARM)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def memory_use() -> dict[str, int]:
    """Bytes now: resident and shared of this process (mapped shards are shared), and free on the machine."""
    own = psutil.Process().memory_info()
    return {"resident": own.rss, "shared": own.shared, "available": psutil.virtual_memory().available}
