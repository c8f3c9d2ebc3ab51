"""Local response normalisation (LRN) against plain loops, torch's own operators, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.recipe import PAPER, SOURCE2012, LocalResponseNorm
from model.response_norm import lrn_across_maps, lrn_within_map
from tests.model.plain_lrn import plain_lrn_across_maps, plain_lrn_within_map

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
