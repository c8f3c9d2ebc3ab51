"""LRN in Triton's kernels, in Triton's interpreter on the CPU; and compiled for GPUs, without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from model.lrn_view import across_maps, within_map
from model.recipe import SOURCE2012
from tests.model.test_response_norm import KINDS, LAYOUTS, STRONG, plain, pooled

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed; torch's builds for CUDA install it"
    ),
    pytest.mark.filterwarnings("default"),  # Triton's own
]
SOURCE = Path(__file__).parents[2] / "model" / "lrn_triton.py"


def loaded(name: str) -> Any:
    """A new copy of the module. Triton decides when a kernel is defined whether it is interpreted."""
    spec = importlib.util.spec_from_file_location(name, SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The module with interpreted kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield loaded("interpreted_lrn")


def fused(kernels: Any, x: torch.Tensor, towers: int | None, norm: Any = STRONG) -> torch.Tensor:
    view = within_map(x, norm.window) if towers is None else across_maps(x, norm.window, towers)
    result: torch.Tensor = view.activations(kernels.TritonResponseNorm.apply(view.view(x), norm, view))
    return result


@pytest.mark.parametrize("shape", [(2, 18, 5, 6), (1, 2, 3, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("towers", KINDS)
def test_the_kernels_equal_the_plain_loops(
    towers: int | None, layout: torch.memory_format, shape: tuple[int, ...], kernels: Any
):
    """In float64, both kinds and both memory layouts, in several programs and with a last one that is not full."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = fused(kernels, x.contiguous(memory_format=layout), towers)
    torch.testing.assert_close(found, torch.from_numpy(plain(x, STRONG, towers)), rtol=1e-12, atol=0)
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("towers", KINDS)
def test_gradients_of_the_kernels_are_the_derivatives(towers: int | None, layout: torch.memory_format, kernels: Any):
    """They agree with finite differences in a random direction, and all of them with those of torch's operators."""
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small = x.clone(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: fused(kernels, a, towers), (small,), fast_mode=True)
    x = torch.randn(2, 18, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf, twin = (x.clone(memory_format=layout).requires_grad_() for _ in range(2))
    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (fused(kernels, leaf, towers) * weights).sum().backward()
    (pooled(twin, STRONG, towers) * weights).sum().backward()
    assert leaf.grad is not None and twin.grad is not None
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_other_types_are_computed_in_float32(dtype: torch.dtype, tolerance: float, kernels: Any):
    """Activations of 300, whose squares overflow float16, too; the result has the type of the activations."""
    x = (300 * torch.randn(1, 10, 3, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = fused(kernels, x, 2, SOURCE2012.lrn)
    assert found.dtype == dtype
    expected = fused(kernels, x.double(), 2, SOURCE2012.lrn)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)


def test_a_step_has_two_launches_for_each_layer_and_7_passes(kernels: Any, monkeypatch: pytest.MonkeyPatch):
    """The kernels have every tensor once as an argument: 2.4 GB for all LRN of a step at batch 128 and full width."""
    launches = list[int]()

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **settings: Any) -> None:
                launches.append(sum(each.numel() * each.element_size() for each in args if torch.is_tensor(each)))
                self.kernel[grid](*args, **settings)

            return launch

    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Recorded(getattr(kernels, name)))
    x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fused(kernels, x, 2).sum().backward()
    assert launches == [3 * 100 * 4, 4 * 100 * 4]
    activations = 128 * (96 * 55**2 + 2 * 256 * 27**2)
    assert 7 * 4 * activations < 2.4e9


def test_more_activations_than_a_kernel_can_address_are_refused(kernels: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MOST", 99)
    with pytest.raises(ValueError, match="LRN of 100 activations, expected at most 99; choose a smaller --batch"):
        fused(kernels, torch.zeros(1, 4, 5, 5), 2)


@pytest.mark.slow
def test_the_kernels_compile_for_gpus(tmp_path: Path):
    """Triton compiles both kernels for the activations of conv2, in float32 and bfloat16, down to the machine code of
    two generations of GPUs. No GPU is needed, but a process in which nothing was interpreted."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=variables | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "90"]


COMPILE = """
import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.lrn_triton import backward_kernel, forward_kernel, settings_of
from model.lrn_view import within_map
from model.recipe import SOURCE2012

norm = SOURCE2012.lrn_within_map
settings = settings_of(norm, within_map(torch.empty(1, 256, 27, 27, device="meta"), norm.window))
for capability, dtype in ((80, "*fp32"), (90, "*bf16")):
    forward = {"x": dtype, "out": dtype, "q": "*fp32", "count": "i32"}
    backward = {"x": dtype, "q": "*fp32", "grad": dtype, "out": dtype, "count": "i32"}
    for kernel, signature, constants in (
        (forward_kernel, forward, settings | {"K": norm.k}),
        (backward_kernel, backward, settings),
    ):
        signature = signature | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert len(compile_kernel(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]) > 1000
    print(capability)
"""
