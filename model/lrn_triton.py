"""Local response normalisation (LRN) as two Triton kernels, one for each direction.

The maths is that of `model.response_norm`. Forward reads x and writes the result and q = d^(-beta-1); backward reads x,
q and the gradient and writes the gradient of x: 7 passes over memory, where torch's operators need 26. Neighbours in a
window are read from the processor's caches. d^-beta = q^(beta / (beta + 1)), so d is not kept.

Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1), which is how the tests check them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.lrn_view import WindowView
from model.recipe import LocalResponseNorm

BLOCK = 512  # activations of a program
MOST = 2**31 - BLOCK  # activations; offsets in the kernels are 32-bit


@triton.jit
def forward_kernel(
    x,
    out,
    q,
    count,
    A: tl.constexpr,
    B: tl.constexpr,
    INNER: tl.constexpr,
    HALF_A: tl.constexpr,
    HALF_B: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes `out` = x * d^-beta and `q` = d^(-beta-1), in the precision of `q`."""
    wide = q.dtype.element_ty
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a, b = at // (B * INNER) % A, at // INNER % B
    total = tl.zeros([BLOCK], dtype=wide)
    for i in tl.static_range(-HALF_A, HALF_A + 1):
        for j in tl.static_range(-HALF_B, HALF_B + 1):
            near = inside & (a + i >= 0) & (a + i < A) & (b + j >= 0) & (b + j < B)
            value = tl.load(x + at + (i * B + j) * INNER, mask=near, other=0.0).to(wide)
            total += value * value
    log_d = tl.log2(K + ALPHA * total)
    here = tl.load(x + at, mask=inside, other=0.0).to(wide)
    tl.store(out + at, here * tl.exp2(-BETA * log_d), mask=inside)
    tl.store(q + at, tl.exp2(-(BETA + 1) * log_d), mask=inside)


@triton.jit
def backward_kernel(
    x,
    q,
    grad,
    out,
    count,
    A: tl.constexpr,
    B: tl.constexpr,
    INNER: tl.constexpr,
    HALF_A: tl.constexpr,
    HALF_B: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes `out` = grad * d^-beta - 2 alpha beta x * (sum of grad * x * q over the window)."""
    wide = q.dtype.element_ty
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a, b = at // (B * INNER) % A, at // INNER % B
    total = tl.zeros([BLOCK], dtype=wide)
    for i in tl.static_range(-HALF_A, HALF_A + 1):
        for j in tl.static_range(-HALF_B, HALF_B + 1):
            near = inside & (a + i >= 0) & (a + i < A) & (b + j >= 0) & (b + j < B)
            there = at + (i * B + j) * INNER
            slope = tl.load(grad + there, mask=near, other=0.0).to(wide)
            slope *= tl.load(x + there, mask=near, other=0.0).to(wide)
            total += slope * tl.load(q + there, mask=near, other=0.0)
    power = tl.exp2(tl.log2(tl.load(q + at, mask=inside, other=1.0)) * (BETA / (BETA + 1)))
    here = tl.load(x + at, mask=inside, other=0.0).to(wide)
    own = tl.load(grad + at, mask=inside, other=0.0).to(wide)
    tl.store(out + at, own * power - (2 * ALPHA * BETA) * here * total, mask=inside)


def settings_of(norm: LocalResponseNorm, view: WindowView) -> dict[str, Any]:
    """The compile-time arguments that both kernels have."""
    _, a, b, inner = view.shape
    shape = {"A": a, "B": b, "INNER": inner, "HALF_A": view.half_a, "HALF_B": view.half_b}
    return {**shape, "ALPHA": norm.alpha, "BETA": norm.beta, "BLOCK": BLOCK}


class TritonResponseNorm(torch.autograd.Function):
    """LRN of a `WindowView`, in the kernels of this module."""

    @staticmethod
    def forward(ctx: Any, viewed: Tensor, norm: LocalResponseNorm, view: WindowView) -> Tensor:
        """`viewed` times d^-beta; computed in float32, or in float64 if it is float64."""
        count = viewed.numel()
        if count > MOST:
            raise ValueError(f"LRN of {count:,} activations, expected at most {MOST:,}; choose a smaller --batch")
        wide = torch.promote_types(viewed.dtype, torch.float32)
        out, q = torch.empty_like(viewed), torch.empty_like(viewed, dtype=wide)
        grid = (triton.cdiv(count, BLOCK),)
        forward_kernel[grid](viewed, out, q, count, K=norm.k, **settings_of(norm, view))
        ctx.save_for_backward(viewed, q)
        ctx.norm, ctx.view = norm, view
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As `model.response_norm.ResponseNorm.backward`."""
        viewed, q = ctx.saved_tensors
        out = torch.empty_like(viewed)
        grid = (triton.cdiv(viewed.numel(), BLOCK),)
        settings = settings_of(ctx.norm, ctx.view)
        backward_kernel[grid](viewed, q, grads[0].contiguous(), out, viewed.numel(), **settings)
        return out, None, None
