"""Notices during a run that training has begun to wait for its input, and when that is over.

The run is judged block by block, each some seconds of training. A block's wait share is compared with the level of the
run's own earlier blocks and with the AU (accelerator utilisation) threshold. Several blocks in a row must be above, so
that noise or a short disturbance gives no line. Counters of the host, read once a block, show what changed: `reason`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles

from pipeline.diagnosis.accounting import AU_THRESHOLD
from pipeline.diagnosis.run_account import MORE_IO_SHARE
from pipeline.diagnosis.workload import NEIGHBOURS_SHARE, SWAPPED_BYTES_S, THROTTLED_SHARE
from pipeline.profiling.cpu_time import CpuUse

COLD_SHARE = 0.1  # of the bytes of the batches: from here on reads from storage are a cause
MAD_TO_SIGMA = 1.048  # median of absolute differences of two normal values, times this, is their standard deviation
TAIL_SIGMAS = 0.97  # standard deviations between the 5% and the 25% quantile of a normal distribution


@dataclass(frozen=True)
class WatchSettings:
    """When training counts as input-bound in mid-run.

    Attributes:
        au_threshold: a wait share up to 1 - this is never reported.
        level_blocks: blocks before the first one that is judged; they show the run's own level.
        confirm_blocks: least number of blocks in a row that must be above the limit, or below it again.
        confirm_s: seconds of training that these must take. After each spell it takes as many more to begin another
            one, so that a run with long waves does not fill the screen.
        rise: least increase of the wait share over the run's own level.
        waits_ratio: least ratio of waits for each second of work over the run's own level.
        noise_ratio: least increase over the level, in standard deviations between blocks.
        kept_blocks: blocks from which the level is taken.
    """

    au_threshold: float = AU_THRESHOLD
    level_blocks: int = 6
    confirm_blocks: int = 2
    confirm_s: float = 20.0
    rise: float = 0.05
    waits_ratio: float = 2.0
    noise_ratio: float = 4.0
    kept_blocks: int = 1000


@dataclass(frozen=True)
class Evidence:
    """What the counters of the host showed during some steps.

    Attributes:
        use: CPU use by owner, and pressure.
        read_bytes: bytes that this process read from storage, rather than from the page cache.
        needed_bytes: bytes of the images in this process's batches.
    """

    use: CpuUse
    read_bytes: int = 0
    needed_bytes: int = 0

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            self.use + other.use, self.read_bytes + other.read_bytes, self.needed_bytes + other.needed_bytes
        )

    @property
    def cold_share(self) -> float:
        """Bytes from storage over the bytes of the batches. Read-ahead may read more than a batch needs."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else 0.0

    @property
    def storage_mb_s(self) -> float:
        """MB a second from storage."""
        return self.read_bytes / 1e6 / self.use.wall_s

    @property
    def io_share(self) -> float:
        """Share of the time in which some task waited for storage; 0 if the kernel does not count it."""
        return self.use.pressure.waiting_shares.get("io", 0.0)


@dataclass(frozen=True)
class Block:
    """Some steps in a row.

    Attributes:
        first_step: optimizer step of its first step, from 1.
        last_step: optimizer step of its last step.
        wait_s: seconds that training waited for images; on an asynchronous device, idle time of the device.
        elapsed_s: seconds of these steps, without pauses.
        evidence: what the counters showed meanwhile.
    """

    first_step: int
    last_step: int
    wait_s: float
    elapsed_s: float
    evidence: Evidence

    @property
    def wait_share(self) -> float:
        """Share of the time in which training waited."""
        return self.wait_s / self.elapsed_s


class MidRunWatch:
    """Judges a run's blocks in their order.

    Args:
        cores: cores of this host on which the job may run.
        settings: when training counts as input-bound.

    Attributes:
        input_bound: whether training has become input-bound, and still is.
    """

    def __init__(self, cores: float, settings: WatchSettings | None = None) -> None:
        self._cores, self._settings = cores, settings or WatchSettings()
        self._usual = deque[Block](maxlen=self._settings.kept_blocks)  # blocks outside a spell
        self._spell = list[Block]()  # blocks since training became input-bound
        self._pending = list[Block]()  # the last blocks, if they differ from the state, and are too few to change it
        self._level = self._limit = 0.0
        self._spells = 0
        self.input_bound = False

    def add(self, block: Block) -> str | None:
        """Judges the next block; returns a line if training has become input-bound with it, or no longer is."""
        if not self.input_bound:
            if len(self._usual) < self._settings.level_blocks:
                self._usual.append(block)
                return None
            if not self._pending:
                self._level = self._usual_level()
                self._limit = self._limit_over(self._level)
            changed = block.wait_share > self._limit
        else:
            changed = block.wait_share < (self._level + self._limit) / 2
        self._pending.append(block)
        if not changed:
            self._state_blocks.extend(self._pending)
            self._pending = []
        if not self._confirmed():
            return None
        line = self._ended() if self.input_bound else self._begun()
        self._spells += self.input_bound
        self.input_bound, self._spell = not self.input_bound, list[Block]()
        self._state_blocks.extend(self._pending)
        self._pending = []
        return line

    def _confirmed(self) -> bool:
        needed_s = self._settings.confirm_s * (1 if self.input_bound else 1 + self._spells)
        took_s = sum(block.elapsed_s for block in self._pending)
        return len(self._pending) >= self._settings.confirm_blocks and took_s >= needed_s

    @property
    def _state_blocks(self) -> deque[Block] | list[Block]:
        return self._spell if self.input_bound else self._usual

    def _usual_level(self) -> float:
        """The wait share of the run so far: its lower quartile, since a slow start must not hide what comes later."""
        return quantiles([block.wait_share for block in self._usual], n=4, method="inclusive")[0]

    def _limit_over(self, level: float) -> float:
        """The wait share from which on a run of this level has become input-bound."""
        settings = self._settings
        noise = _noise([block.wait_share for block in self._usual])
        waits = settings.waits_ratio * level  # seconds of waiting for each 1 - level seconds of work
        share = waits / (1 - level + waits)
        return max(1 - settings.au_threshold, level + settings.rise, level + settings.noise_ratio * noise, share)

    def _begun(self) -> str:
        spell = self._pending
        usual = [block for block in self._usual if block.wait_share <= self._limit]  # without a slow start
        why = reason(_sum(spell), _sum(usual), self._cores)
        return (
            f"training has become input-bound at step {spell[0].first_step:,}: it waits {_share(spell):.0%} of the"
            f" time, before that {_share(usual):.0%}; {why}"
        )

    def _ended(self) -> str:
        spell, after = self._spell, self._pending
        return (
            f"training is no longer input-bound since step {after[0].first_step:,}: it waits {_share(after):.0%} of the"
            f" time; for {sum(block.elapsed_s for block in spell):,.0f} s it waited {_share(spell):.0%}"
        )


def _noise(shares: Sequence[float]) -> float:
    """Standard deviation of the wait share of a run that does not change: two estimates, of which the larger counts.

    Differences of neighbouring blocks do not see slow waves; the lower tail does. Neither sees a slow start.
    """
    differences = MAD_TO_SIGMA * median(abs(after - before) for before, after in pairwise(shares))
    twentieths = quantiles(shares, n=20, method="inclusive")
    return max(differences, (twentieths[4] - twentieths[0]) / TAIL_SIGMAS)


def _share(blocks: Sequence[Block]) -> float:
    return sum(block.wait_s for block in blocks) / sum(block.elapsed_s for block in blocks)


def _sum(blocks: Sequence[Block]) -> Evidence:
    first, *others = [block.evidence for block in blocks]
    return sum(others, first)


def reason(then: Evidence, before: Evidence, cores: float) -> str:
    """Which part of the input became slower, and the figures that show it: the first rule that fits.

    Storage comes before other processes, since whatever makes storage slow also uses some CPU time.

    Args:
        then: while training was input-bound.
        before: until then.
        cores: cores of this host on which the job may run.
    """
    pressure, usual = then.use.pressure, before.use.pressure
    if pressure.throttled_share > max(THROTTLED_SHARE, 2 * usual.throttled_share):
        periods = f"in {pressure.throttled_share:.0%} of its periods, before in {usual.throttled_share:.0%}"
        return f"cores: the CPU quota stops this job {periods}"
    if pressure.swapped_in_bytes > SWAPPED_BYTES_S * then.use.wall_s:
        return f"memory: {pressure.swapped_in_bytes / 2**20:,.0f} MiB were read from swap"
    if then.cold_share > max(COLD_SHARE, 2 * before.cold_share):
        cold, rate = f"{min(1.0, then.cold_share):.0%}", f"at {then.storage_mb_s:,.0f} MB/s"
        return f"storage: {cold} of the images' bytes come from storage {rate}, before {before.cold_share:.0%}"
    if then.io_share > before.io_share + MORE_IO_SHARE:
        rates = f"; it gives {then.storage_mb_s:,.0f} MB/s, before {before.storage_mb_s:,.0f}" * bool(then.read_bytes)
        return f"storage: some task waits for it in {_shares(then.io_share, before.io_share)}{rates}"
    taken, usually = (evidence.use.cores()["neighbours"] for evidence in (then, before))
    if taken - usually > NEIGHBOURS_SHARE * cores:
        return f"cores: other processes use {taken:.1f} of {cores:g}, before {usually:.1f}"
    return "neither cores, storage nor memory of this host show why"


def _shares(then: float, before: float) -> str:
    return f"{then:.0%} of the time, before {before:.0%}"


class WaitMeter:
    """Sums up how long this rank's steps waited, without the steps that begin an epoch and the first ones of a run.

    Args:
        asynchronous: whether the device has a clock of its own. Then a wait counts only as far as the device was idle.
        warm_up_steps: first steps that do not count: they use up what was prefetched before training began.
    """

    def __init__(self, asynchronous: bool, warm_up_steps: int = 20) -> None:
        self._asynchronous, self._left_out = asynchronous, warm_up_steps
        self._waits_s = deque[tuple[float, bool]]()  # of steps that the device has not passed
        self._wait_s = self._elapsed_s = 0.0

    def step(self, wait_s: float, loop_s: float, edge: bool) -> None:
        """Adds a step by the host's clocks; the arguments are those of `StepClocks.add`."""
        if self._asynchronous:
            self._waits_s.append((wait_s, edge))
        else:
            self._add(wait_s, loop_s, edge)

    def device_step(self, gap_s: float | None, step_s: float, steps: int = 1) -> None:
        """Adds a step by the device's clock; the arguments are those of `StepClocks.add_device`."""
        waits_s = [self._waits_s.popleft() for _ in range(steps)]
        if gap_s is not None:
            wait_s, edge = waits_s[0]
            self._add(min(gap_s, wait_s), gap_s + step_s, edge)

    def _add(self, wait_s: float, elapsed_s: float, edge: bool) -> None:
        if self._left_out:
            self._left_out -= 1
        elif not edge:
            self._wait_s += wait_s
            self._elapsed_s += elapsed_s

    def take(self) -> tuple[float, float]:
        """Seconds waited and seconds elapsed since the last call."""
        taken = self._wait_s, self._elapsed_s
        self._wait_s = self._elapsed_s = 0.0
        return taken
