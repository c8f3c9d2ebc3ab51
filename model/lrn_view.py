"""Activations as they lie in memory, cut so that the windows of local response normalisation (LRN) become simple.

In memory activations are a contiguous array (outer, A, B, inner). A window covers `2 * half_a + 1` positions of A and
`2 * half_b + 1` of B, and is cut off at the ends. One kernel then serves both kinds of LRN and both memory layouts:

    kind               layout           outer      A   B      inner
    across maps        contiguous       N*T        1   C      H*W         (T towers of C feature maps each)
    across maps        channels last    N*H*W*T    1   C      1
    within a map       contiguous       N*T*C      H   W      1
    within a map       channels last    N          H   W      T*C
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowView:
    """The view of activations (N, T*C, H, W) for one kind of LRN.

    Attributes:
        nchw: shape of the activations.
        shape: shape of the view, (outer, A, B, inner).
        half_a: positions of A on each side of the centre of a window.
        half_b: positions of B on each side of the centre of a window.
        channels_last: memory layout of the activations.
    """

    nchw: tuple[int, int, int, int]
    shape: tuple[int, int, int, int]
    half_a: int
    half_b: int
    channels_last: bool

    def view(self, x_nchw: Tensor) -> Tensor:
        """The view of activations. They are copied if they have neither of the two memory layouts."""
        if self.channels_last:
            return x_nchw.permute(0, 2, 3, 1).contiguous().view(self.shape)
        return x_nchw.contiguous().view(self.shape)

    def activations(self, viewed: Tensor) -> Tensor:
        """The activations of a view; the inverse of `view`."""
        n, channels, h, w = self.nchw
        return viewed.view(n, h, w, channels).permute(0, 3, 1, 2) if self.channels_last else viewed.view(self.nchw)


def across_maps(x_nchw: Tensor, window: int, towers: int) -> WindowView:
    """The view for LRN over neighbouring feature maps of the same tower."""
    n, channels, h, w = x_nchw.shape
    maps, last = channels // towers, _is_channels_last(x_nchw)
    shape = (n * h * w * towers, 1, maps, 1) if last else (n * towers, 1, maps, h * w)
    return WindowView((n, channels, h, w), shape, 0, window // 2, last)


def within_map(x_nchw: Tensor, window: int) -> WindowView:
    """The view for LRN over neighbouring pixels of the same feature map."""
    n, channels, h, w = x_nchw.shape
    last = _is_channels_last(x_nchw)
    shape = (n, h, w, channels) if last else (n * channels, h, w, 1)
    return WindowView((n, channels, h, w), shape, window // 2, window // 2, last)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
