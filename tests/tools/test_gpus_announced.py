"""GPUs that were announced but cannot be used are an error of one line, not training on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from pipeline.loader import settings
from pipeline.loader.settings import LoaderSettings, check_device
from tools.shared import rank_choice
from tools.shared.rank_choice import default_device, gpus_announced, ranks_for


@pytest.mark.parametrize(
    ("variables", "device_files", "nvml", "announced"),
    [
        ({}, [], 0, False),
        ({}, ["nvidia0"], 0, True),
        ({}, ["nvidiactl"], 0, False),
        ({}, [], 2, True),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, [], 0, True),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, [], 0, False),
        ({"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], 1, False),
    ],
)
def test_gpus_are_announced_by_device_files_nvml_or_the_container(
    variables: dict[str, str],
    device_files: list[str],
    nvml: int,
    announced: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in device_files:
        (tmp_path / name).touch()
    monkeypatch.setattr(rank_choice, "visible_gpus", lambda: nvml)
    assert gpus_announced(tmp_path) is announced


@pytest.mark.parametrize("announced", [True, False])
def test_a_tool_without_device_takes_the_gpus_that_were_announced(announced: bool, monkeypatch: pytest.MonkeyPatch):
    """`check_device` then refuses those that torch cannot use. The CPU would be a silent substitute."""
    monkeypatch.setattr(rank_choice, "gpus_announced", lambda: announced)
    assert default_device() == ("cuda" if announced else "cpu")


def test_announced_gpus_that_torch_does_not_see_are_no_reason_for_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """run_all prints the choice before training fails; the two lines must not contradict each other."""
    monkeypatch.setattr(rank_choice, "visible_gpus", lambda: 0)
    monkeypatch.setattr(rank_choice, "gpus_announced", lambda: True)
    assert "torch sees none of them" in ranks_for([]).why and ranks_for([]).ranks == 1
    assert "because of --device cpu" in ranks_for(["--device", "cpu"]).why
    monkeypatch.setattr(rank_choice, "gpus_announced", lambda: False)
    assert "no GPU is visible" in ranks_for([]).why


def test_torch_s_own_warning_of_several_lines_is_not_shown(monkeypatch: pytest.MonkeyPatch):
    """pytest makes a warning an error."""

    def warn() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    monkeypatch.setattr(torch.cuda, "device_count", warn)
    with pytest.raises(ValueError, match="driver needed"):
        check_device("cuda")
    assert not rank_choice.visible_gpus()


def test_the_error_names_the_driver_found_and_the_driver_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n")
    monkeypatch.setattr(settings, "DRIVER_VERSION", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"driver found: 535\.183\.01; driver needed: 580 or newer") as error:
        check_device("cuda")
    assert "\n" not in str(error.value)


def test_one_decoder_decodes_all_images_by_default():
    assert LoaderSettings().hw_decoder_load == 0
