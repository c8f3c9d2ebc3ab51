"""Sums of parameter gradients over the parts of the batch, started during the backward pass.

This is data parallelism as in `DistributedDataParallel`, reduced to what towers need: each rank sums only the
parameters of the towers that it holds, over the ranks that hold the same ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.parallel.ranks import AsyncHandle, Ranks

BUCKET_BYTES = 4 << 20  # gradients smaller than this share a bucket


class _Bucket:
    """Gradients that are summed in one operation."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.bytes = self.ready = 0
        self.flat: Tensor | None = None
        self.in_place = False  # whether `flat` is the gradient itself
        self.handle: AsyncHandle | None = None


class GradientSums:
    """Sums gradients over the data ranks.

    A sum starts as soon as the backward pass has computed all gradients of a bucket. Buckets are filled from the last
    layer to the first, since the backward pass computes gradients in that order. A large gradient has its own bucket
    and is summed in place; small gradients are copied into one tensor, since each operation has a fixed cost. A
    gradient with the channels last is copied, too, and gets its layout back: the optimizer requires that of the
    parameter.
    """

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        self._ranks = ranks
        self._buckets = [_Bucket()]
        for parameter in reversed(list(model.parameters())):
            bucket = self._buckets[-1]
            size = parameter.numel() * parameter.element_size()
            if bucket.parameters and bucket.bytes + size > BUCKET_BYTES:
                bucket = _Bucket()
                self._buckets.append(bucket)
            bucket.parameters.append(parameter)
            bucket.bytes += size
            # This hook runs when `parameter.grad` is complete, unlike a tensor hook, which runs before it is stored.
            parameter.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def gradient_is_ready(parameter: Tensor) -> None:
            bucket.ready += 1
            if bucket.ready == len(bucket.parameters):
                self._start(bucket)

        return gradient_is_ready

    def _start(self, bucket: _Bucket) -> None:
        gradients = [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]
        bucket.in_place = len(gradients) == 1 and gradients[0].is_contiguous()
        bucket.flat = gradients[0] if bucket.in_place else torch.cat([g.flatten() for g in gradients])
        bucket.handle = self._ranks.start_sum(bucket.flat)

    def finish(self) -> None:
        """Waits for all sums and stores them in `parameter.grad`, where the optimizer reads them."""
        self._ranks.mark("summing the gradients")
        for bucket in self._buckets:
            assert bucket.handle is not None and bucket.flat is not None, "the backward pass left out a gradient"
            with self._ranks.spans.span("sums"):
                bucket.handle.wait()
            if not bucket.in_place:
                sizes = [parameter.numel() for parameter in bucket.parameters]
                pieces = torch.split(bucket.flat, sizes)
                for parameter, summed in zip(bucket.parameters, pieces, strict=True):
                    layout = torch.contiguous_format if parameter.is_contiguous() else torch.channels_last
                    parameter.grad = summed.view_as(parameter).contiguous(memory_format=layout)
            bucket.flat, bucket.handle, bucket.ready = None, None, 0
