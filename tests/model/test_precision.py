"""Precision of products: torch's switches, what a machine can compute, what a run records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.precision import autocast, prepare, set_products
from model.recipe import PRECISIONS
from model.runs import RunFolder
from model.step_options import check_step, describe_step
from model.trainer import LoopSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SWITCHES = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)


@pytest.fixture(autouse=True)
def _restored_switches() -> object:
    yield
    set_products("ieee", fixed_shapes=False)


def switches() -> set[str]:
    """What torch uses for convolutions and for matrix products."""
    return {switch.fp32_precision for switch in SWITCHES}


@pytest.mark.parametrize("before", PRECISIONS)
@pytest.mark.parametrize(("precision", "products"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")])
def test_convolutions_and_matrix_products_have_the_same_switch(before: str, precision: str, products: str):
    """Whatever was set before; torch's older interface reads the same, without its error about mixed interfaces."""
    for each in (before, precision):
        with autocast(CUDA, each) if each != "bfloat16" else torch.no_grad():
            set_products("tf32" if each == "tf32" else "ieee", fixed_shapes=True)
    assert switches() == {products}
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (products == "tf32")
    assert torch.get_float32_matmul_precision() == ("high" if products == "tf32" else "highest")
    assert torch.backends.cudnn.benchmark


def test_autocast_sets_the_switches_of_its_precision_on_a_gpu_only():
    set_products("ieee", fixed_shapes=True)
    autocast(CPU, "float32")
    assert switches() == {"ieee"} and torch.backends.cudnn.benchmark
    autocast(CUDA, "tf32")
    assert switches() == {"tf32"} and not torch.backends.cudnn.benchmark
    autocast(CUDA, "float32", fixed_shapes=True)
    assert switches() == {"ieee"} and torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("device", "precision", "last"), [
    ("cuda", "float32", False), ("cuda", "tf32", True), ("cuda", "bfloat16", True), ("cpu", "bfloat16", False),
])  # fmt: skip
def test_tensor_cores_get_weights_with_the_channels_last(device: str, precision: str, last: bool):
    conv = torch.nn.Conv2d(4, 4, 3)
    prepare(conv, device, precision)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) == last != conv.weight.is_contiguous()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with tensor cores, as torch would describe it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gpu_with_tensor_cores_has_all_precisions(precision: str, gpu: None):
    check_step(CUDA, precision, cuda_graph=True)


@pytest.mark.parametrize(("options", "message"), [
    ({"precision": "tf32"}, "--precision tf32 needs a CUDA device, found cpu; choose float32"),
    ({"cuda_graph": True}, "--cuda-graph needs a CUDA device, found cpu; leave it out"),
    ({"lrn": "triton"}, "--lrn triton needs a CUDA device, found cpu; choose --lrn eager"),
])  # fmt: skip
def test_options_of_gpus_are_refused_on_the_cpu(options: dict, message: str):
    check_step(CPU)
    with pytest.raises(ValueError) as error:
        check_step(CPU, **options)
    assert str(error.value) == message


def test_a_graph_of_several_ranks_is_refused(gpu: None):
    with pytest.raises(ValueError, match="--cuda-graph works on one rank, found 2; leave it out, or train on one GPU"):
        check_step(CUDA, cuda_graph=True, world=2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gpu_without_tensor_cores_has_float32_only(precision: str, gpu: None, monkeypatch: pytest.MonkeyPatch):
    """Torch would compute TF32 as IEEE there, and emulate bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    if precision == "float32":
        check_step(CUDA, precision)
        return
    with pytest.raises(ValueError, match=rf"{precision} needs compute capability 8.0, found 7.5 \(Tesla T4\); choose"):
        check_step(CUDA, precision)


@pytest.mark.parametrize(("override", "precision"), [("1", "float32"), ("1", "bfloat16"), ("0", "tf32")])
def test_a_variable_that_overrules_the_precision_is_refused(
    override: str, precision: str, gpu: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    with pytest.raises(ValueError, match=f"=.* overrules --precision {precision}; unset NVIDIA_TF32_OVERRIDE"):
        check_step(CUDA, precision)
    check_step(CUDA, "tf32" if override == "1" else "float32")


@pytest.mark.parametrize("found", ["triton", "compiler", "headers", "all"])
def test_triton_needs_its_package_a_compiler_and_headers(
    found: str, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each message says what is missing."""
    have = ["triton", "compiler", "headers", "all"].index(found)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if have > 0 else None)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/gcc" if have > 1 else None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    if found == "all":
        (tmp_path / "Python.h").touch()
        check_step(CUDA, lrn="triton")
        return
    missing = {"triton": "the package triton", "compiler": "a C compiler", "headers": "Python's headers"}[found]
    with pytest.raises(ValueError, match=f"--lrn triton needs {missing}.*; choose --lrn eager"):
        check_step(CUDA, lrn="triton")


def test_the_screen_says_what_is_computed():
    assert describe_step("cpu", "bfloat16", "eager", cuda_graph=False) == "bfloat16"
    assert describe_step("cuda", "float32", "eager", cuda_graph=False) == "float32 with IEEE products, LRN eager"
    found = describe_step("cuda", "tf32", "triton", cuda_graph=True)
    assert found == "float32 with TF32 products, LRN triton, CUDA graph"


@pytest.mark.parametrize("setting", ["precision", "lrn"])
def test_unknown_settings_are_refused(setting: str):
    with pytest.raises(ValueError, match=f"{setting} 'float16', expected one of "):
        LoopSettings(1, 1, 0, **{setting: "float16"})


def test_a_resumed_run_must_have_its_precision(tmp_path: Path):
    """One line, which names both; the folder stays as it was."""
    begun, now = ({"must_match": {"precision": precision}} for precision in ("float32", "tf32"))
    folder = RunFolder(tmp_path / "run")
    folder.begin(begun, resume=False)
    with pytest.raises(ValueError, match=r"begun with precision .float32., now .tf32.; resume with the same, or"):
        folder.begin(now, resume=True)
    assert folder.config() == begun
