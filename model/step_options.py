"""Options of a training step that change its speed: what each of them needs, and how it is described."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from model.recipe import LRN_FORMS, PRECISIONS

OVERRIDE = "NVIDIA_TF32_OVERRIDE"  # read by NVIDIA's libraries; it overrules torch's switches
TENSOR_CORES = (8, 0)  # first compute capability with TF32 and bfloat16
TITLES = {
    "float32": "float32 with IEEE products",
    "tf32": "float32 with TF32 products",
    "bfloat16": "float32 weights with bfloat16 products",
}


def check_step(
    device: torch.device, precision: str = "float32", lrn: str = "eager", cuda_graph: bool = False, world: int = 1
) -> None:
    """Checks that this machine can compute a step with these options.

    Args:
        device: where the step is computed.
        precision: one of `model.recipe.PRECISIONS`.
        lrn: one of `model.recipe.LRN_FORMS`.
        cuda_graph: whether the step is captured once and replayed.
        world: number of ranks.

    Raises:
        ValueError: if it cannot. The message names the option and what to choose instead.
    """
    assert precision in PRECISIONS and lrn in LRN_FORMS
    _check_precision(device, precision)
    if lrn == "triton":
        _check_triton(device)
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a CUDA device, found {device.type}; leave it out")
    if cuda_graph and world > 1:
        # Transfers between ranks would have to be captured, too, and a rank that captures again (a new learning rate)
        # must not meet another one that replays.
        raise ValueError(f"--cuda-graph works on one rank, found {world}; leave it out, or train on one GPU")


def _check_precision(device: torch.device, precision: str) -> None:
    if device.type != "cuda":
        if precision == "tf32":
            raise ValueError(f"--precision tf32 needs a CUDA device, found {device.type}; choose float32")
        return
    override = os.environ.get(OVERRIDE)
    if override and (override != "0") != (precision == "tf32"):
        raise ValueError(f"{OVERRIDE}={override} overrules --precision {precision}; unset {OVERRIDE}")
    capability = torch.cuda.get_device_capability(device)
    if precision != "float32" and capability < TENSOR_CORES:
        found, needed = (".".join(map(str, numbers)) for numbers in (capability, TENSOR_CORES))
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"--precision {precision} needs compute capability {needed}, found {found} ({name}); choose float32"
        )


def _check_triton(device: torch.device) -> None:
    """Triton compiles a small C program when it starts, with the headers of Python."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compilers = [os.environ.get("CC"), "gcc", "clang"]
    if device.type != "cuda":
        missing = f"a CUDA device, found {device.type}"
    elif importlib.util.find_spec("triton") is None:
        missing = "the package triton, which torch's builds for CUDA install"
    elif not any(shutil.which(name) for name in compilers if name):
        missing = "a C compiler, found neither gcc nor clang"
    elif not headers.is_file():
        missing = f"Python's headers, found no {headers}"
    else:
        return
    raise ValueError(f"--lrn triton needs {missing}; choose --lrn eager")


def describe_step(device: str, precision: str, lrn: str, cuda_graph: bool) -> str:
    """The options in a few words, for the screen. On the CPU only the precision is a choice."""
    if device == "cpu":
        return precision
    return f"{TITLES[precision]}, LRN {lrn}{', CUDA graph' if cuda_graph else ''}"
