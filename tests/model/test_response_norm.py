"""Local response normalisation (LRN) against plain loops, torch's own operators, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.lrn_view import across_maps, within_map
from model.recipe import LRN_FORMS, PAPER, SOURCE2012, LocalResponseNorm, LrnForm
from model.response_norm import PooledResponseNorm, ResponseNorm, lrn_across_maps, lrn_within_map
from tests.model.plain_lrn import plain_lrn_across_maps, plain_lrn_within_map
from tests.support.launches import META, Launches

STRONG = LocalResponseNorm(window=5, alpha=0.3, beta=0.75, k=1.5)  # strong enough to make a mistake visible


@pytest.mark.parametrize("maps", [1, 2, 4, 9])
def test_lrn_across_maps_stays_in_its_tower(maps: int) -> None:
    """Each tower is normalised as if it were alone, by the formula of paper section 3.3 in plain loops."""
    x = torch.randn(2, 2 * maps, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(maps))
    got = lrn_across_maps(x, STRONG, towers=2).numpy()
    alone = [plain_lrn_across_maps(half.numpy(), STRONG) for half in x.split(maps, dim=1)]
    np.testing.assert_allclose(got, np.concatenate(alone, 1), rtol=1e-12)


@pytest.mark.parametrize("side", [1, 3, 7])
def test_lrn_within_map_is_the_average_pool_form(side: int) -> None:
    """It equals x / (k + scale * mean over 5x5)^beta, where pixels past the edge count as 0, and the plain loops."""
    x = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    got = lrn_within_map(x, STRONG)
    pooled = torch.nn.functional.avg_pool2d(x.square(), 5, 1, 2, count_include_pad=True)
    assert torch.allclose(got, x / (STRONG.k + 25 * STRONG.alpha * pooled) ** STRONG.beta, rtol=1e-12)
    np.testing.assert_allclose(got.numpy(), plain_lrn_within_map(x.numpy(), STRONG), rtol=1e-12)


def test_recipes_agree_with_torch_s_local_response_norm() -> None:
    """Torch divides alpha by the window, as the source did. So the source is 1e-4 there, and the paper's text 5e-4."""
    x = 30 * torch.randn(2, 48, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for norm, alpha in ((SOURCE2012.lrn, 1e-4), (PAPER.lrn, 5e-4)):
        expected = torch.nn.functional.local_response_norm(x, 5, alpha, 0.75, 2.0)
        assert torch.allclose(lrn_across_maps(x, norm, towers=1), expected, rtol=1e-12)
    assert SOURCE2012.lrn_within_map is not None
    expected = x / (1 + 1e-3 * torch.nn.functional.avg_pool2d(x.square(), 5, 1, 2)) ** 0.75
    assert torch.allclose(lrn_within_map(x, SOURCE2012.lrn_within_map), expected, rtol=1e-12)


def test_gradients_are_the_derivatives() -> None:
    """The closed form agrees with finite differences, in both memory layouts."""
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        assert torch.autograd.gradcheck(lambda a: lrn_across_maps(a, STRONG, 2), (leaf,))
        assert torch.autograd.gradcheck(lambda a: lrn_within_map(a, STRONG), (leaf,))


def test_float16_is_squared_in_float32() -> None:
    """Activations of 300, whose squares overflow float16, are normalised; the result is float16 again."""
    x = torch.full((1, 8, 3, 3), 300.0, dtype=torch.float16)
    for found in (lrn_across_maps(x, STRONG, 2), lrn_within_map(x, STRONG)):
        assert found.dtype == torch.float16
        assert 0 < found.min() <= found.max() < 300


# ---- other devices than the CPU ---------------------------------------------------------------------------------


def pooled(x: torch.Tensor, norm: LocalResponseNorm, towers: int | None) -> torch.Tensor:
    """The eager form of GPUs, here on the CPU: across maps, or within a map if `towers` is None."""
    view = within_map(x, norm.window) if towers is None else across_maps(x, norm.window, towers)
    return view.activations(PooledResponseNorm.apply(view.view(x), norm, view))


LAYOUTS = [torch.contiguous_format, torch.channels_last]
KINDS = [1, 2, None]  # towers, or None for LRN within a map


def plain(x: torch.Tensor, norm: LocalResponseNorm, towers: int | None) -> np.ndarray:
    """The plain loops, tower by tower."""
    if towers is None:
        return plain_lrn_within_map(x.numpy(), norm)
    return np.concatenate([plain_lrn_across_maps(half.numpy(), norm) for half in x.chunk(towers, dim=1)], 1)


@pytest.mark.parametrize("shape", [(2, 18, 5, 6), (3, 4, 1, 7), (1, 2, 3, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("towers", KINDS)
def test_the_eager_form_of_gpus_equals_the_plain_loops(
    towers: int | None, layout: torch.memory_format, shape: tuple[int, ...]
) -> None:
    """In float64, both kinds and both memory layouts; the result has the layout of the activations."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = pooled(x.contiguous(memory_format=layout), STRONG, towers)
    np.testing.assert_allclose(found.numpy(), plain(x, STRONG, towers), rtol=1e-12)
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("towers", KINDS)
def test_gradients_of_the_eager_form_of_gpus_are_the_derivatives(
    towers: int | None, layout: torch.memory_format
) -> None:
    """They agree with finite differences, and with those of the CPU's form."""
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf, twin = x.clone(memory_format=layout).requires_grad_(), x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: pooled(a, STRONG, towers), (leaf,))
    out = lrn_within_map(twin, STRONG) if towers is None else lrn_across_maps(twin, STRONG, towers)
    weights = torch.arange(x.numel(), dtype=torch.float64).view(x.shape)
    (out * weights).sum().backward()
    (pooled(leaf, STRONG, towers) * weights).sum().backward()
    assert leaf.grad is not None and twin.grad is not None
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_the_eager_form_of_gpus_computes_16_bits_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    """Activations of 300, whose squares overflow float16: result and gradient are right to their own rounding."""
    x = (300 * torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = pooled(leaf, SOURCE2012.lrn, 2), pooled(twin, SOURCE2012.lrn, 2)
    found.backward(weights)
    expected.backward(weights.double())
    assert leaf.grad is not None and twin.grad is not None and found.dtype == leaf.grad.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_eager_form_of_gpus_moves_less_than_10_gb_a_step(layout: torch.memory_format, dtype: torch.dtype) -> None:
    """All LRN of a step at batch 128 and full width: 26 passes over float32 activations, counted operator by operator.
    The forward pass of the CPU's form alone would move as much."""
    activations = [((128, 96, 55, 55), 2), ((128, 256, 27, 27), 2), ((128, 256, 27, 27), None)]
    assert SOURCE2012.lrn_within_map is not None
    one_pass, seen = 0, []
    with Launches() as launches:
        for shape, towers in activations:
            x = torch.empty(shape, device=META, dtype=dtype, memory_format=layout).requires_grad_()
            seen.append(x)
            within = towers is None
            out = lrn_within_map(x, SOURCE2012.lrn_within_map) if within else lrn_across_maps(x, SOURCE2012.lrn, towers)
            out.backward(torch.empty_like(out))
            one_pass += 4 * x.numel()
    assert all(x.grad is not None and x.grad.stride() == x.stride() for x in seen)
    assert launches.bytes == pytest.approx(26 * one_pass, rel=1e-6)
    assert launches.bytes < 10e9 and launches.count == (33 if dtype == torch.float32 else 36)
    with Launches() as of_cpu:
        for shape, _ in activations:
            ResponseNorm.apply(torch.empty(shape, device=META), SOURCE2012.lrn, (-3,))
    assert of_cpu.bytes > launches.bytes * 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", LRN_FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_forms_on_a_gpu_equal_the_cpu(layout: torch.memory_format, form: LrnForm) -> None:
    """Results and gradients in float64, and results in float32 and bfloat16 to their rounding."""
    x = 30 * torch.randn(3, 96, 27, 27, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert SOURCE2012.lrn_within_map is not None
    on_cpu, on_gpu = x.clone().requires_grad_(), x.cuda().contiguous(memory_format=layout).requires_grad_()
    for each in (on_cpu, on_gpu):
        chosen = form if each is on_gpu else "eager"
        out = lrn_within_map(lrn_across_maps(each, SOURCE2012.lrn, 2, chosen), SOURCE2012.lrn_within_map, chosen)
        (out * torch.arange(27, device=each.device)).sum().backward()
    assert on_cpu.grad is not None and on_gpu.grad is not None
    torch.testing.assert_close(on_gpu.grad.cpu(), on_cpu.grad, rtol=1e-9, atol=1e-9)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        found = lrn_across_maps(x.cuda().to(dtype), SOURCE2012.lrn, 2, form)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double().cpu(), lrn_across_maps(x, SOURCE2012.lrn, 2), rtol=tolerance, atol=0)
