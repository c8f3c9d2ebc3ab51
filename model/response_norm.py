"""Local response normalisation (LRN): across the feature maps of a tower, and over the pixels within one feature map.

Takes activations (N, C, H, W) of any floating type and gives the same shape and type. Both kinds divide every
activation x by (k + alpha * sum of x^2 over a window)^beta and differ only in the dimensions of the window. The
settings are `model.recipe.LocalResponseNorm`. Files such as layers-145.cfg belong to the released source.

Autograd could derive the gradient from the plain operators, but it would keep and read back every intermediate tensor.
So every form has its own backward pass. The forms agree to rounding:

    ResponseNorm          on the CPU: window sums by shifted additions in place
    PooledResponseNorm    elsewhere, form "eager": window sums by average pooling, as few passes over memory as torch's
                          operators allow
    TritonResponseNorm    elsewhere, form "triton" (`model.lrn_triton`): one kernel for each direction
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.lrn_view import WindowView, across_maps, within_map
from model.recipe import LocalResponseNorm, LrnForm


def lrn_across_maps(x_nchw: Tensor, norm: LocalResponseNorm, towers: int, form: LrnForm = "eager") -> Tensor:
    """LRN over neighbouring feature maps (paper section 3.3), for each tower on its own.

    Args:
        x_nchw: activations of `towers` towers, one tower after the other along dimension 1.
        norm: settings; the window counts feature maps.
        towers: number of towers in `x_nchw`, 1 or 2. A window never reaches into the other tower.
        form: how it is computed; the CPU has one form, "eager".
    """
    if x_nchw.device.type != "cpu":
        return _viewed(x_nchw, norm, across_maps(x_nchw, norm.window, towers), form)
    assert form == "eager"
    n, channels, h, w = x_nchw.shape
    return _normalised(x_nchw.view(n, towers, channels // towers, h, w), norm, (-3,)).view(n, channels, h, w)


def lrn_within_map(x_nchw: Tensor, norm: LocalResponseNorm, form: LrnForm = "eager") -> Tensor:
    """LRN over neighbouring pixels of the same feature map: `rnorm` of layers-145.cfg:107-117. The paper has no such
    layer. `form` is that of `lrn_across_maps`."""
    if x_nchw.device.type != "cpu":
        return _viewed(x_nchw, norm, within_map(x_nchw, norm.window), form)
    assert form == "eager"
    return _normalised(x_nchw, norm, (-2, -1))


def _normalised(x: Tensor, norm: LocalResponseNorm, dims: tuple[int, ...]) -> Tensor:
    out: Tensor = ResponseNorm.apply(_wide(x), norm, dims)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


def _viewed(x_nchw: Tensor, norm: LocalResponseNorm, view: WindowView, form: LrnForm) -> Tensor:
    function: type[torch.autograd.Function] = PooledResponseNorm
    if form == "triton":
        from model.lrn_triton import TritonResponseNorm  # triton is there only with torch's builds for GPUs

        function = TritonResponseNorm
    out: Tensor = function.apply(view.view(x_nchw), norm, view)  # type: ignore[no-untyped-call]
    return view.activations(out)


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider: float16 cannot hold the square of 300."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ResponseNorm(torch.autograd.Function):
    """x * d^-beta, with d = k + alpha * (sum of x^2 over the window), and its gradient in closed form."""

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


class PooledResponseNorm(torch.autograd.Function):
    """The same maths on a `WindowView`, with few passes over memory: 11 forward and 15 backward.

    A pass reads or writes one tensor of float32 activations. The formulas are those of `ResponseNorm`. Activations of
    16 bits are cast where they are read or written, and cost no more.
    """

    @staticmethod
    def forward(ctx: Any, viewed: Tensor, norm: LocalResponseNorm, view: WindowView) -> Tensor:
        """`viewed` times d^-beta."""
        x = _wide(viewed)
        # k + alpha * sum in one operator, which reads and writes once; the scalar k is broadcast
        d = torch.add(x.new_full((), norm.k), _pooled_sum(x.square(), view), alpha=norm.alpha)
        power = d.pow(-norm.beta)
        ctx.save_for_backward(x, d, power)
        ctx.norm, ctx.view = norm, view
        return torch.mul(x, power, out=torch.empty_like(viewed))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As `ResponseNorm.backward`."""
        x, d, power = ctx.saved_tensors
        norm: LocalResponseNorm = ctx.norm
        scaled = grads[0] * power
        through_d = _pooled_sum((scaled * x).div_(d), ctx.view)
        factor, gradient = -2 * norm.alpha * norm.beta, torch.empty_like(grads[0])
        return torch.addcmul(scaled, x, through_d, value=factor, out=gradient), None, None


def _pooled_sum(viewed: Tensor, view: WindowView) -> Tensor:
    """Sum over each window. Average pooling with a divisor of 1 reads and writes once for windows of any size."""
    outer, a, b, inner = view.shape
    size_a, size_b = 2 * view.half_a + 1, 2 * view.half_b + 1
    if a == 1:  # one dimension, B, with whole rows of `inner` behind each other
        planes, kernel, pad = viewed.reshape(1, outer, b, inner), (size_b, 1), (view.half_b, 0)
    else:  # two dimensions; as (outer, inner, A, B) with the channels last, also if `inner` is 1
        planes, kernel, pad = viewed.permute(0, 3, 1, 2), (size_a, size_b), (view.half_a, view.half_b)
    pooled = F.avg_pool2d(planes, kernel, 1, pad, divisor_override=1)
    return (pooled if a == 1 else pooled.permute(0, 2, 3, 1)).reshape(view.shape)
