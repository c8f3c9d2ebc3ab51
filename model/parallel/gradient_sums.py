"""TODO-DOC model.parallel.gradient_sums (from model.exchange)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.parallel.ranks import AsyncHandle, Ranks

BUCKET_BYTES = 4 << 20  # smaller gradients are summed together


class _Bucket:
    """Gradients that are summed over the parts of the batch in one go."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.bytes = self.ready = 0
        self.flat: Tensor | None = None
        self.flight: AsyncHandle | None = None


class GradientSums:
    """Sums gradients over the data parts, each bucket as soon as backward has made all of it; the last layer's are
    first. A large gradient is its own bucket and is summed in place, small ones are copied together."""

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
            parameter.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    def _hook(self, bucket: _Bucket) -> Any:
        def made(parameter: Tensor) -> None:
            bucket.ready += 1
            if bucket.ready == len(bucket.parameters):
                self._launch(bucket)

        return made

    def _launch(self, bucket: _Bucket) -> None:
        gradients = [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]
        bucket.flat = torch.cat([g.flatten() for g in gradients]) if len(gradients) > 1 else gradients[0]
        bucket.flight = self._ranks.add_up(bucket.flat)

    def finish(self) -> None:
        """Waits for all sums and puts them where the update looks for them."""
        self._ranks.mark("adding up the gradients")
        for bucket in self._buckets:
            assert bucket.flight is not None and bucket.flat is not None, "a gradient was not made"
            with self._ranks.spans.span("sums"):
                bucket.flight.wait()
            if len(bucket.parameters) > 1:
                sizes = [parameter.numel() for parameter in bucket.parameters]
                pieces = torch.split(bucket.flat, sizes)
                for parameter, summed in zip(bucket.parameters, pieces, strict=True):
                    parameter.grad = summed.view_as(parameter)
            bucket.flat, bucket.flight, bucket.ready = None, None, 0
