"""Times parts of the training stream by name, such as waiting for another rank, without making the host wait."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StreamTimer:
    """Adds up seconds by name: by CUDA events on a GPU, by the host's clock on the CPU.

    On a GPU a wait for NCCL returns at once and makes only the stream wait, so the host's clock would show nothing. The
    event pairs are kept until `fold`, which costs little once the device has passed them.

    Attributes:
        seconds: seconds by name, of the spans that were folded.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`; a block that is recorded as part of a CUDA graph has no time."""
        if self._cuda and torch.cuda.is_current_stream_capturing():
            yield
        elif self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()  # type: ignore[no-untyped-call]
            yield
            end.record()  # type: ignore[no-untyped-call]
            self._pending.append((name, start, end))
        else:
            started_s = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - started_s

    def fold(self) -> None:
        """Adds all pending spans to `seconds`; waits for the device if it has not passed them."""
        for _ in range(len(self._pending)):
            name, start, end = self._pending.popleft()
            end.synchronize()  # type: ignore[no-untyped-call]
            self.seconds[name] += start.elapsed_time(end) / 1000  # type: ignore[no-untyped-call]

    def take(self) -> dict[str, float]:
        """Returns the seconds so far by name, and starts again from 0."""
        self.fold()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken
