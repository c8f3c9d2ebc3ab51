"""The settings of the data loader, checked when they are constructed, and the check that a CUDA device exists."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch

from pipeline.host import whole_cores
from pipeline.loader.augment import CROP, POSITIONS, STORED, Lighting, Mean
from pipeline.loader.order import Order

Device = Literal["cpu", "cuda"]
OnBadSample = Literal["stop", "skip"]
Library = Literal["dali", "webdataset"]
Stage = Literal["read", "decode", "full"]  # the last stage of a loader that is cut short for timing
PACKAGES: dict[Library, str] = {"dali": "nvidia.dali", "webdataset": "webdataset"}
READ_AHEAD_BATCHES = 4  # batches between asking the kernel to read the bytes of a batch and handing them to DALI


def default_threads() -> int:
    """The default number of DALI threads: one more than the cores that this process may use, and at most 8.

    The extra thread keeps the cores busy while another thread waits for the end of a batch (6 % faster on 2 cores).
    DALI recommends 4 to 8 threads for each GPU.
    """
    return min(8, whole_cores() + 1)


DRIVER_VERSION = Path("/proc/driver/nvidia/version")
DRIVER_NEEDED = 580  # by builds of torch for CUDA 13, such as torch 2.13.0 from PyPI


def driver_found() -> str:
    """The version of the NVIDIA driver that is loaded, or "none"."""
    text = DRIVER_VERSION.read_text() if DRIVER_VERSION.is_file() else ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found.group() if found else "none"


def cuda_works() -> bool:
    """Whether torch can use a CUDA device; without torch's own warning about the driver, which is several lines."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="CUDA initialization", category=UserWarning)
        return torch.cuda.is_available()


def check_device(device: str) -> None:
    """Checks that torch can use `device`.

    Raises:
        ValueError: `device` is "cuda" and torch finds no CUDA device.
    """
    if device == "cuda" and not cuda_works():
        raise ValueError(
            f"device is cuda, but torch finds no CUDA device: driver found: {driver_found()}; driver needed: "
            f"{DRIVER_NEEDED} or newer for CUDA 13; update the driver, install a build of torch for CUDA 12, or use "
            "--device cpu"
        )


def check_decoder(device: str, hw_decoder_load: float | None) -> None:
    """Checks that a share of JPEGs for a GPU's JPEG engines has an effect.

    Raises:
        ValueError: the device is "cpu" and the share is above 0.
    """
    if device == "cpu" and hw_decoder_load:
        raise ValueError(
            f"--hw-decoder-load {hw_decoder_load:g} has no effect on device cpu, where one decoder decodes all images; "
            "use --device cuda, or --hw-decoder-load 0"
        )


def check_library(library: Library) -> None:
    """Checks that the library of a loader is installed.

    Raises:
        ValueError: it is not.
    """
    try:
        found = find_spec(PACKAGES[library])
    except ModuleNotFoundError:  # the package above it is missing
        found = None
    if found is None:
        others = [f"--loader {other}" for other in PACKAGES if other != library]
        raise ValueError(
            f"--loader {library}: {PACKAGES[library]} is not installed in this environment; "
            f"run pip install -e . (DALI has packages for Linux only), or use {others[0]}"
        )


@dataclass(frozen=True)
class LoaderSettings:
    """How the loader works.

    These settings decide what is in a batch: batch, seed, lighting, lighting_until, mean, positions, order and
    window_shards; if the set is damaged, on_bad_sample and check_crc, too; on a GPU also hw_decoder_load. `library`
    changes pixels only as far as decoders round differently. The others change only the speed.

    With hw_decoder_load above 0, DALI sorts the images of a rank's batch by area and gives the first ones to the GPU's
    JPEG engines, whose pixels differ slightly. Which decoder gets an image then depends on the other images, and so on
    the number of ranks. The default gives all images to one decoder.

    Raises:
        ValueError: a value is outside its range or is not one of the choices.
    """

    batch: int = 128  # samples in the global batch, which all ranks share (paper section 5)
    seed: int = 0  # of the order, the crops, the mirroring and the PCA (principal component analysis) lighting noise
    device: Device = "cpu"  # "cuda" is torch's current device
    library: Library = "dali"  # "webdataset": webdataset in torch's DataLoader, with Pillow; runs without DALI
    threads: int = field(default_factory=default_threads)  # DALI's CPU threads; webdataset: worker processes
    queue_depth: int = 2  # batches that DALI, or a worker, works on at once; a third one gained nothing
    lighting: Lighting = field(default_factory=Lighting)
    lighting_until: int | None = None  # the first epoch without noise and division (run notes of 2012: 66 to 68)
    mean: Mean = "image"  # as in the released code (convdata_jpeg.py:95)
    positions: int = POSITIONS  # crop offsets in each direction: 33 in the released code, 32 in paper section 4.1
    order: Order = "global"  # "windowed" reads `window_shards` shards at a time, for sets larger than memory
    window_shards: int = 16  # batches mix classes as well as a uniform shuffle does (docs/loader.md)
    on_bad_sample: OnBadSample = "stop"  # "skip": training uses a substitute sample, evaluation leaves the sample out
    check_crc: bool = False  # compare every image with its CRC-32 in index.npy
    max_bad_samples: int = 100  # each rank skips at most this many different samples, then stops
    hw_decoder_load: float = 0.0  # share of JPEGs for the GPU's decoder engines; 0: one decoder for all images
    preallocate: bool = True  # give these engines memory for the set's largest image at the start

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "queue_depth", "window_shards", "max_bad_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**64 - 1")
        choices_of = {"device": Device, "library": Library, "mean": Mean, "order": Order, "on_bad_sample": OnBadSample}
        for name, choices in choices_of.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(get_args(choices))}")
        if not 1 <= self.positions <= POSITIONS:
            raise ValueError(
                f"crop positions is {self.positions}; a crop of {CROP} pixels out of {STORED} has 1 to {POSITIONS}"
            )
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load is {self.hw_decoder_load}; it is a share and must be from 0 to 1")
        if self.hw_decoder_load and self.library != "dali":
            raise ValueError(
                f"hw_decoder_load is {self.hw_decoder_load}, but the library {self.library} decodes on the CPU; use 0"
            )

    @property
    def prefetched_batches(self) -> int:
        """The most batches that may be prepared, or read from storage, before they are requested.

        A benchmark discards this many batches first, since their speed says nothing about the loader's.
        """
        if self.library == "webdataset":
            return self.threads * self.queue_depth + 1
        return self.queue_depth + READ_AHEAD_BATCHES + 2

    def lighting_at(self, epoch: int) -> Lighting:
        """The lighting noise of `epoch`: `lighting`, or a coefficient of 0 from epoch `lighting_until` on."""
        if self.lighting_until is not None and epoch >= self.lighting_until:
            return replace(self.lighting, coefficient=0.0)
        return self.lighting
