"""TODO-DOC model.response_norm (from model.alexnet)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.recipe import Norm


class ResponseNorm(torch.autograd.Function):
    """x * d^-beta, with d = k + alpha * (sum of x^2 over the window), and its gradient in closed form.

    Forward and backward together take less than half the time that autograd needs through the plain operators.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
        d = _window_sum(x.square(), norm.size, dims).mul_(norm.alpha).add_(norm.k)
        power = d.pow(-norm.beta)
        ctx.save_for_backward(x, d, power)
        ctx.norm, ctx.dims = norm, dims
        return x * power

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d(out_j)/d(x_i) = d_j^-beta [i = j] - 2 alpha beta x_i x_j d_j^(-beta-1) [i in the window of j]."""
        x, d, power = ctx.saved_tensors
        norm: Norm = ctx.norm
        scaled = grads[0] * power
        through_d = _window_sum((scaled * x).div_(d), norm.size, ctx.dims).mul_(x)
        return scaled.sub_(through_d, alpha=2 * norm.alpha * norm.beta), None, None


def _window_sum(x: Tensor, size: int, dims: tuple[int, ...]) -> Tensor:
    """Sum of `x` over a centred window of `size` along each of `dims`, cut off at the ends."""
    for dim in dims:
        length, total = x.shape[dim], x.clone()
        for shift in range(1, min(size // 2, length - 1) + 1):
            kept = length - shift
            total.narrow(dim, shift, kept).add_(x.narrow(dim, 0, kept))
            total.narrow(dim, 0, kept).add_(x.narrow(dim, shift, kept))
        x = total
    return x


def norm_across_maps(x_nchw: Tensor, norm: Norm, towers: int) -> Tensor:
    """Divides each response by those of the maps next to it in its own tower, (N, T*M, H, W) to the same (P 3.3)."""
    n, maps, h, w = x_nchw.shape
    return _respond(x_nchw.view(n, towers, maps // towers, h, w), norm, (-3,)).view(n, maps, h, w)


def norm_within_map(x_nchw: Tensor, norm: Norm) -> Tensor:
    """Divides each response by those around it in its own map: `rnorm` of layers-145.cfg:107-117, not in the paper."""
    return _respond(x_nchw, norm, (-2, -1))


def _respond(x: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares do not fit into half precision
    out: Tensor = ResponseNorm.apply(wide, norm, dims)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)
