"""Whether the JPEG engines of an NVIDIA GPU decode images: yes, no or unknown, with the evidence.

DALI gives a share of the images (`hw_decoder_load`) to the engines if it finds them, and says nothing if it does not.
The engines need the driver's libnvcuvid, which a container has only with the driver capability "video". The driver's
management library (NVML) reports how busy the engines are. `EngineWatch` reads it while a loader works.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ENGINE_LIBRARY = "libnvcuvid.so.1"
MANAGEMENT_LIBRARY = "libnvidia-ml.so.1"
CAPABILITIES = "NVIDIA_DRIVER_CAPABILITIES"
READ_INTERVAL_S = 0.1
Active = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class DecoderEvidence:
    """What there is to judge by.

    Attributes:
        share: `hw_decoder_load` of the loader: the share of images for the JPEG engines.
        library: whether libnvcuvid can be loaded.
        capabilities: NVIDIA_DRIVER_CAPABILITIES of a container; None if it is not set.
        busiest_percent: the highest utilisation of the JPEG engines that NVML reported while the loader worked; None
            if NVML reported none.
    """

    share: float
    library: bool
    capabilities: str | None
    busiest_percent: int | None


@dataclass(frozen=True)
class HardwareDecoding:
    """The judgement.

    Attributes:
        active: whether the JPEG engines decode images.
        because: the evidence, in words.
    """

    active: Active
    because: str

    def __str__(self) -> str:
        return f"JPEG engines active: {self.active}; {self.because}"


def judge(evidence: DecoderEvidence) -> HardwareDecoding:
    """Judges by the strongest evidence: utilisation, then what the engines require, then nothing."""
    busiest, share = evidence.busiest_percent, evidence.share
    if busiest:
        others = "" if share else ", although hw_decoder_load is 0: another process may use them"
        return HardwareDecoding("yes" if share else "unknown", f"they were up to {busiest} % busy{others}")
    if not share:
        return HardwareDecoding("no", "hw_decoder_load is 0: one decoder for all images")
    if not evidence.library:
        remedy = (
            f"add video to {CAPABILITIES}={evidence.capabilities}" if _lacks_video(evidence) else "check the driver"
        )
        return HardwareDecoding("no", f"{ENGINE_LIBRARY} cannot be loaded; {remedy}")
    if busiest == 0:
        return HardwareDecoding(
            "no", f"hw_decoder_load is {share:g}, but NVML reported them idle while images were decoded"
        )
    return HardwareDecoding("unknown", f"{ENGINE_LIBRARY} can be loaded, but NVML reports no utilisation of them")


def _lacks_video(evidence: DecoderEvidence) -> bool:
    return evidence.capabilities is not None and not {"video", "all"} & set(evidence.capabilities.split(","))


class EngineWatch:
    """Reads the utilisation of the JPEG engines in a thread while its block runs.

    Args:
        read_percent: gives the utilisation now; None if there is no reading.
        interval_s: seconds between readings.

    Attributes:
        busiest_percent: the highest reading; None if there was none.
    """

    def __init__(self, read_percent: Callable[[], int | None], interval_s: float = READ_INTERVAL_S) -> None:
        self.busiest_percent: int | None = None
        self._read_percent, self._interval_s = read_percent, interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="JPEG engines", daemon=True)

    def __enter__(self) -> EngineWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._read()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._read()

    def _read(self) -> None:
        percent = self._read_percent()
        if percent is not None:
            self.busiest_percent = max(percent, self.busiest_percent or 0)

    def judged(self, share: float) -> HardwareDecoding:
        """Judges by what was read, and by this machine, for a loader with `share` as its hw_decoder_load."""
        capabilities = os.environ.get(CAPABILITIES)
        return judge(DecoderEvidence(share, can_load(ENGINE_LIBRARY), capabilities, self.busiest_percent))


def can_load(library: str) -> bool:
    """Whether the dynamic linker finds a library and all that it needs."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def engine_reader(gpu_uuid: str, library: str = MANAGEMENT_LIBRARY) -> Callable[[], int | None]:
    """Returns a function that reads the utilisation of a GPU's JPEG engines in percent, from NVML.

    Args:
        gpu_uuid: of the GPU, "GPU-" and the number that torch or nvidia-smi shows.
        library: NVML.

    Returns:
        The function; it gives None if NVML is missing, or does not report these engines (older driver, MIG).
    """
    try:
        nvml = ctypes.CDLL(library)
        device = ctypes.c_void_p()
        failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(gpu_uuid.encode(), ctypes.byref(device))
        read = nvml.nvmlDeviceGetJpgUtilization
    except (OSError, AttributeError):
        return lambda: None
    if failed:
        return lambda: None

    def percent() -> int | None:
        used, period_us = ctypes.c_uint(), ctypes.c_uint()
        return None if read(device, ctypes.byref(used), ctypes.byref(period_us)) else used.value

    return percent
