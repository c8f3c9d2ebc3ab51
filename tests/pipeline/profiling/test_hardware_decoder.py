"""Whether the JPEG engines decode: the judgement for every kind of evidence, and the driver's library as a fake."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.hardware_decoder import DecoderEvidence, EngineWatch, can_load, engine_reader, judge
from tools.shared import jpeg_engines

NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = (void *)7; return uuid[4] == 'a'; }
int nvmlDeviceGetJpgUtilization(void *device, unsigned *used, unsigned *period_us)
{ *used = device == (void *)7 ? 61 : 0; *period_us = 1; return %d; }
"""


@pytest.mark.parametrize(
    ("evidence", "active", "because"),
    [
        (DecoderEvidence(0.65, True, "compute,utility,video", 61), "yes", "up to 61 % busy"),
        (DecoderEvidence(0.65, True, None, 0), "no", "NVML reported them idle"),
        (DecoderEvidence(0.65, True, None, None), "unknown", "no utilisation"),
        (
            DecoderEvidence(0.65, False, "compute,utility", 0),
            "no",
            "add video to NVIDIA_DRIVER_CAPABILITIES=compute,util",
        ),
        (DecoderEvidence(0.65, False, "compute,utility", None), "no", "add video to"),
        (DecoderEvidence(0.65, False, "all", None), "no", "check the driver"),
        (DecoderEvidence(0.65, False, None, None), "no", "libnvcuvid.so.1 cannot be loaded; check the driver"),
        (DecoderEvidence(0.0, False, "compute,utility", None), "no", "hw_decoder_load is 0"),
        (DecoderEvidence(0.0, True, None, 0), "no", "hw_decoder_load is 0"),
        (DecoderEvidence(0.0, True, None, 12), "unknown", "another process may use them"),
    ],
)
def test_the_strongest_evidence_decides(evidence: DecoderEvidence, active: str, because: str):
    found = judge(evidence)
    assert found.active == active and because in found.because
    assert str(found).startswith(f"JPEG engines active: {active}; ")


def test_the_highest_reading_counts_and_no_reading_is_none():
    """The last reading is taken when the block ends, so a short block has one too."""
    readings, all_read = [3, None, 40, 7], threading.Event()

    def read_percent() -> int | None:
        if len(readings) == 1:
            all_read.set()
        return readings.pop(0) if readings else 0

    with EngineWatch(read_percent, interval_s=1e-4) as watch:
        assert all_read.wait(60)
    assert watch.busiest_percent == 40
    with EngineWatch(lambda: 5, interval_s=60) as watch:
        pass
    assert watch.busiest_percent == 5 and watch.judged(0.5).active == "yes"
    with EngineWatch(lambda: None, interval_s=60) as watch:
        pass
    assert watch.busiest_percent is None


@pytest.mark.parametrize(("uuid", "code", "percent"), [("GPU-7", 0, 61), ("GPU-7", 3, None), ("GPU-a", 0, None)])
def test_utilisation_is_read_from_the_driver(uuid: str, code: int, percent: int | None, tmp_path: Path):
    """A fake of NVML: its reading, a GPU that reports none (code 3: not supported), and a GPU that it does not find."""
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(NVML % code)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    assert engine_reader(uuid, str(library))() == percent


def test_without_the_driver_there_is_no_reading():
    assert engine_reader("GPU-7", "libno-such-library.so.1")() is None
    assert engine_reader("GPU-7", "libc.so.6")() is None  # a library without NVML's functions
    assert can_load("libc.so.6") and not can_load("libno-such-library.so.1")


def test_a_rank_s_own_gpu_is_watched(monkeypatch: pytest.MonkeyPatch):
    """Ranks may see GPUs under other numbers than the driver, so the GPU is found by its UUID. Nothing on the CPU."""
    asked = list[str]()

    def reader(uuid: str) -> Callable[[], int | None]:
        asked.append(uuid)
        return lambda: 44

    monkeypatch.setattr(jpeg_engines, "engine_reader", reader)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-{device.index}")
    )
    settings = LoaderSettings(hw_decoder_load=0.65)
    result, record = jpeg_engines.with_engines_watched(torch.device("cuda", 1), settings, lambda: "decoded")
    assert (result, asked) == ("decoded", ["GPU-uuid-1"])
    assert record["hardware_decoding"]["active"] == "yes" and "44 %" in record["hardware_decoding"]["because"]
    assert jpeg_engines.with_engines_watched(torch.device("cpu"), settings, lambda: 3) == (3, {})
