"""Local response normalisation (LRN): across the feature maps of a tower, and over the pixels within one feature map.

Takes activations (N, C, H, W) of any floating type and gives the same shape and type. Both forms divide every
activation x by (k + alpha * sum of x^2 over a window)^beta and differ only in the dimensions of the window. The
settings are `model.recipe.LocalResponseNorm`. Files such as layers-145.cfg belong to the released source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.recipe import LocalResponseNorm


def lrn_across_maps(x_nchw: Tensor, norm: LocalResponseNorm, towers: int) -> Tensor:
    """LRN over neighbouring feature maps (paper section 3.3), for each tower on its own.

    Args:
        x_nchw: activations of `towers` towers, one tower after the other along dimension 1.
        norm: settings; the window counts feature maps.
        towers: number of towers in `x_nchw`, 1 or 2. A window never reaches into the other tower.
    """
    n, channels, h, w = x_nchw.shape
    return _normalised(x_nchw.view(n, towers, channels // towers, h, w), norm, (-3,)).view(n, channels, h, w)


def lrn_within_map(x_nchw: Tensor, norm: LocalResponseNorm) -> Tensor:
    """LRN over neighbouring pixels of the same feature map: `rnorm` of layers-145.cfg:107-117. The paper has no such
    layer."""
    return _normalised(x_nchw, norm, (-2, -1))


def _normalised(x: Tensor, norm: LocalResponseNorm, dims: tuple[int, ...]) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # float16 cannot hold the square of 300
    out: Tensor = ResponseNorm.apply(wide, norm, dims)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


class ResponseNorm(torch.autograd.Function):
    """x * d^-beta, with d = k + alpha * (sum of x^2 over the window), and its gradient in closed form.

    Autograd could derive the gradient from the plain operators, but it would keep and read back every intermediate
    tensor. Forward and backward of this class together take less than half of that time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: LocalResponseNorm, dims: tuple[int, ...]) -> Tensor:
        """`x` times d^-beta; `dims` are the dimensions of the window."""
        d = _window_sum(x.square(), norm.window, dims).mul_(norm.alpha).add_(norm.k)
        power = d.pow(-norm.beta)
        ctx.save_for_backward(x, d, power)  # backward needs d^-beta again; it is kept because pow is slow
        ctx.norm, ctx.dims = norm, dims
        return x * power

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d(out_j)/d(x_i) = d_j^-beta [i = j] - 2 alpha beta x_i x_j d_j^(-beta-1) [i in the window of j].

        "i in the window of j" is symmetric, because windows are centred. So the sum over j is a window sum again.
        """
        x, d, power = ctx.saved_tensors
        norm: LocalResponseNorm = ctx.norm
        scaled = grads[0] * power
        through_d = _window_sum((scaled * x).div_(d), norm.window, ctx.dims).mul_(x)
        return scaled.sub_(through_d, alpha=2 * norm.alpha * norm.beta), None, None  # no gradient of norm and dims


def _window_sum(x: Tensor, window: int, dims: tuple[int, ...]) -> Tensor:
    """Sum of `x` over a centred window along each of `dims`, cut off at the ends: four shifted additions in place for a
    window of 5."""
    for dim in dims:
        length, total = x.shape[dim], x.clone()
        for shift in range(1, min(window // 2, length - 1) + 1):
            kept = length - shift
            total.narrow(dim, shift, kept).add_(x.narrow(dim, 0, kept))
            total.narrow(dim, 0, kept).add_(x.narrow(dim, shift, kept))
        x = total
    return x
