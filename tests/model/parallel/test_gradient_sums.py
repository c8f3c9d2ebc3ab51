"""Sums of gradients over data ranks: every gradient keeps the memory layout of its parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.parallel import gradient_sums
from model.parallel.gradient_sums import GradientSums
from model.parallel.ranks import AsyncHandle, Ranks


class Doubling(Ranks):
    """A rank whose partner has the same gradients. It sums contiguous tensors only, as gloo does."""

    def start_sum(self, tensor: Tensor) -> AsyncHandle:
        """Doubles the tensor when it is waited for."""
        assert tensor.is_contiguous()
        return AsyncHandle([], [], [(tensor, 2 * tensor)])


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_summed_in_the_layout_of_their_parameters(
    layout: torch.memory_format, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    """With a bucket for each gradient, and with one for all."""
    monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", bucket_bytes)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).to(memory_format=layout)
    images = torch.randn(2, 3, 5, 5)
    net(images).square().sum().backward()
    alone = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    sums = GradientSums(Doubling(), net)
    for _ in range(2):  # buckets are used again
        net.zero_grad()
        net(images).square().sum().backward()
        sums.finish()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * alone[name])
        assert parameter.grad.stride() == parameter.stride()
