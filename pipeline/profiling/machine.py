"""The machine that figures were measured on, since figures of different machines cannot be compared."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from pipeline.host import read_host


def describe_machine() -> dict[str, Any]:
    """The machine as a JSON record.

    Returns:
        `cores` that this process may use, `cores_of_machine` in all, `cpu` model, `ram_bytes`, `system` (kernel) and
        `gpus`.
    """
    host = read_host()
    return {
        "cores": host.cores,
        "cores_of_machine": host.machine_cores,
        "cpu": cpu_model_name(),
        "ram_bytes": host.machine_bytes,
        "system": f"{platform.system()} {platform.release()}",
        "gpus": describe_gpus(),
    }


def describe_gpus() -> list[str]:
    """Name, memory and driver of each GPU, as nvidia-smi prints them; empty if there is no NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return printed.splitlines()


def cpu_model_name() -> str:
    """The CPU model in /proc/cpuinfo, or the architecture if that file names no model (ARM)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def memory_use() -> dict[str, int]:
    """Memory now, in bytes: `resident` and `shared` of this process (mapped files are shared), `available` to it."""
    own = psutil.Process().memory_info()
    return {"resident": own.rss, "shared": own.shared, "available": read_host().available_bytes}
