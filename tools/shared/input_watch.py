"""Watches the input of a run while it trains: `MidRunWatch` with the clocks of all ranks and the counters of this host.

Reading the counters takes milliseconds, so it is done once in `BLOCK_S` of training, on the first rank only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from model.parallel.ranks import Ranks
from pipeline.diagnosis.midrun import Block, Evidence, MidRunWatch, WaitMeter
from pipeline.host import read_host
from pipeline.profiling.cpu_time import CpuMark, cpu_mark

BLOCK_S = 5.0  # seconds of training that are judged together
OWN_IO = Path("/proc/self/io")


@dataclass(frozen=True)
class Counters:
    """CPU clocks and pressure, and bytes that this process has read from storage."""

    cpu: CpuMark
    read_bytes: int


def read_counters() -> Counters:
    """Reads the counters of the host."""
    return Counters(cpu_mark(), storage_bytes())


def storage_bytes(path: Path = OWN_IO) -> int:
    """Bytes that this process has read from storage; 0 if the kernel does not say."""
    with suppress(OSError):
        fields = dict(line.split(": ") for line in path.read_text().splitlines())
        return int(fields.get("read_bytes", 0))
    return 0


class InputWatch:
    """Says once when training has become input-bound, and once when that is over.

    Every rank makes one and calls the same methods at the same steps. The wait of the rank that waits longest counts.

    Args:
        ranks: this rank among the others.
        asynchronous: whether the device has a clock of its own.
        step_bytes: encoded bytes of the images that this rank decodes for a step.
        block_s: seconds of training that are judged together.
        seen: gets the CPU clocks after each block.
        counters: reads the counters of the host.
    """

    def __init__(
        self,
        ranks: Ranks,
        asynchronous: bool,
        step_bytes: float,
        block_s: float = BLOCK_S,
        seen: Callable[[CpuMark], None] = lambda mark: None,
        counters: Callable[[], Counters] = read_counters,
    ) -> None:
        self._ranks, self._step_bytes, self._block_s = ranks, step_bytes, block_s
        self._seen, self._counters = seen, counters
        self._meter = WaitMeter(asynchronous)
        self.step, self.device_step = self._meter.step, self._meter.device_step
        self._watch = MidRunWatch(read_host().cores)
        self._read: Counters | None = None  # at the end of the last block
        self._first_step = 0
        self._wait_s = self._elapsed_s = 0.0

    @property
    def input_bound(self) -> bool:
        """Whether training has become input-bound, and still is; on the first rank."""
        return self._watch.input_bound

    def after_interval(self, step: int) -> str | None:
        """Call on all ranks after the same steps; returns a line to print on the first rank, seldom.

        Args:
            step: optimizer steps so far.
        """
        wait_s, elapsed_s = self._meter.take()
        share = self._ranks.largest(round(1e6 * wait_s / elapsed_s) if elapsed_s else 0) / 1e6
        if not self._ranks.first:
            return None
        self._wait_s += share * elapsed_s
        self._elapsed_s += elapsed_s
        if not elapsed_s or (self._read is not None and self._elapsed_s < self._block_s):
            return None
        return self._end_block(step)

    def _end_block(self, step: int) -> str | None:
        """Judges the block that ends here. The first one only reads the counters: what is before it is warm-up."""
        before, now, line = self._read, self._counters(), None
        self._seen(now.cpu)
        if before is not None:
            needed = round(self._step_bytes * (step - self._first_step + 1))
            evidence = Evidence(before.cpu.until(now.cpu), now.read_bytes - before.read_bytes, needed)
            line = self._watch.add(Block(self._first_step, step, self._wait_s, self._elapsed_s, evidence))
        self._read, self._first_step = now, step + 1
        self._wait_s = self._elapsed_s = 0.0
        return line
