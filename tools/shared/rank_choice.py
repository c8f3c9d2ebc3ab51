"""How many ranks should train on this machine, from its GPUs and from the options that tools/train.py will get."""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.recipe import SOURCE2012, recipe


@dataclass(frozen=True)
class Choice:
    """How many ranks train, and one line that says why."""

    ranks: int
    why: str


def choose_ranks(gpus: int, batch: int, device: str | None = None, layout: str = "towers") -> Choice:
    """Chooses the number of ranks.

    Without a GPU there is one rank, on the CPU. One GPU gets one rank with both towers. With more, every GPU gets a
    rank; in layout "towers" two ranks are a pair and hold one tower each. The choice is the largest number of ranks
    that form whole pairs and share the batch evenly.

    Args:
        gpus: GPUs of this machine.
        batch: images of a global batch.
        device: the `--device` of tools/train.py; None if it is not given.
        layout: the `--layout` of tools/train.py.
    """
    if device == "cpu":
        return Choice(1, "both towers train on the CPU, because of --device cpu")
    if not gpus:
        return Choice(1, "no GPU is visible, so both towers train on the CPU; use this for small experiments only")
    ranks_per_network = 2 if layout == "towers" else 1
    candidates = range(gpus - gpus % ranks_per_network, 1, -ranks_per_network)
    ranks = next((ranks for ranks in candidates if batch % ranks == 0), 1)
    match ranks, layout:
        case 1, _:
            use = "both towers on one"
        case 2, "towers":
            use = "a pair, one tower on each"
        case _, "towers":
            use = f"{ranks // 2} pairs on {ranks} of them, one tower on each"
        case _:
            use = f"both towers on each of {ranks}"
    if idle := gpus - ranks:
        unit = "pairs" if layout == "towers" else "ranks"
        reason = f"more {unit} cannot share a batch of {batch} evenly"
        if ranks == gpus - gpus % ranks_per_network:
            reason = "a pair needs two"
        use += f"; {idle} idle, because {reason}"
    return Choice(ranks, f"{gpus} GPU{'s' if gpus > 1 else ''}: {use}")


def ranks_for(train_options: list[str]) -> Choice:
    """Returns the choice for the GPUs of this machine and further options of tools/train.py."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=SOURCE2012.name)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device")
    parser.add_argument("--layout", default="towers")
    options, _ = parser.parse_known_args(train_options)
    batch = recipe(options.recipe).batch if options.batch is None else options.batch
    gpus = visible_gpus()
    if not gpus and options.device != "cpu" and gpus_announced():
        return Choice(1, "GPUs were announced, but torch sees none of them; training stops and says why")
    return choose_ranks(gpus, batch, options.device, options.layout)


def visible_gpus() -> int:
    """Returns how many GPUs torch sees."""
    import torch  # takes seconds, which `--help` and the container's health check must not pay

    with warnings.catch_warnings():  # of a driver that is too old; `check_device` says so in one line
        warnings.filterwarnings("ignore", message="CUDA initialization", category=UserWarning)
        return torch.cuda.device_count()


def default_device() -> Literal["cpu", "cuda"]:
    """Returns the device of a tool without `--device`: "cuda" if GPUs were announced.

    If torch cannot use them, `check_device` stops the tool with one line. Otherwise it would silently use the CPU.
    """
    return "cuda" if gpus_announced() else "cpu"


def gpus_announced(devices: Path = Path("/dev")) -> bool:
    """Returns whether this machine or container was given GPUs, even if torch cannot use them.

    CUDA_VISIBLE_DEVICES="" or "-1" hides all GPUs on purpose, so it announces none.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if os.environ.get("NVIDIA_VISIBLE_DEVICES", "") not in ("", "none", "void"):
        return True
    return any(devices.glob("nvidia[0-9]*")) or visible_gpus() > 0
