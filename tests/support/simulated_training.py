"""A training run in virtual time: loader, host and device advance a clock, and no time passes in reality.

The device executes steps in order. An asynchronous one, as a GPU, lets the host launch a few steps ahead; a synchronous
one returns from a step when it is done. Everything is deterministic, so what a measurement should find can be computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle

from pipeline.profiling.cpu_time import GROUPS, CpuUse
from pipeline.profiling.windows import TrainerUnderTest, WindowMeasurements, measure_windows

BATCH = 128  # images
WINDOW_S, ROUNDS = 40.0, 3
REPLAYED = -1  # the batch that is trained on again and again; the loader's batches count from 0


@dataclass
class VirtualClock:
    """A clock that only moves when it is told to; called as `time.perf_counter`."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """The time in seconds."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now_s += seconds

    def advance_to(self, at_s: float) -> None:
        """Waits until a moment, which may be over."""
        self.now_s = max(self.now_s, at_s)


@dataclass
class SimulatedEvent:
    """A timing event in the device's queue, as `model.device_clock.Event`."""

    device: SimulatedDevice
    at_s: float = 0.0

    def record(self) -> None:
        """The device passes the event when all work so far is done."""
        self.at_s = max(self.device.clock(), self.device.done_at_s)

    def query(self) -> bool:
        """Whether the device has passed the event."""
        return self.at_s <= self.device.clock()

    def synchronize(self) -> None:
        """Waits until the device has passed the event."""
        self.device.clock.advance_to(self.at_s)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        """Milliseconds until another event."""
        return 1000 * (end.at_s - self.at_s)


@dataclass
class SimulatedDevice:
    """A device that executes one step after another.

    Attributes:
        clock: the host's time.
        launch_s: host seconds of launching a step. The device begins with the first of these, if it has no other work.
        max_pending: steps that may be launched and not done. The host waits in a launch until there are fewer.
        asynchronous: whether a launch returns before the step is done.
        done_at_s: when all work so far is done.
        idle_s: for each step the seconds for which the device had no work before it began.
    """

    clock: VirtualClock
    launch_s: float = 0.004
    max_pending: int = 2
    asynchronous: bool = True
    done_at_s: float = 0.0
    idle_s: list[float] = field(default_factory=list)
    pending: deque[float] = field(default_factory=deque)

    def step(self, step_s: float) -> None:
        """Launches a step of so many device seconds."""
        if len(self.pending) == self.max_pending:
            self.clock.advance_to(self.pending.popleft())
        began_s = max(self.done_at_s, self.clock())
        self.idle_s.append(began_s - self.done_at_s)
        self.clock.advance(self.launch_s)
        self.done_at_s = max(began_s + step_s, self.clock())  # the last kernel cannot end before it is launched
        self.pending.append(self.done_at_s)
        if not self.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Waits until all work is done."""
        self.clock.advance_to(self.done_at_s)
        self.pending.clear()


def simulated_loader(clock: VirtualClock, batches_s: tuple[float, ...], queue_depth: int) -> Iterator[int]:
    """Makes batches of these seconds, again and again, while the host does other things.

    Args:
        clock: the host's time.
        batches_s: seconds that each batch takes, one after another.
        queue_depth: batches that are made or being made and not yet taken, at most.
    """
    ready_s, taken_s = 0.0, deque([0.0] * queue_depth, queue_depth)
    for number, batch_s in enumerate(cycle(batches_s)):
        ready_s = max(ready_s, taken_s[0]) + batch_s  # taken_s[0]: when the batch `queue_depth` before was taken
        clock.advance_to(ready_s)
        taken_s.append(clock())
        yield number


@dataclass(frozen=True)
class SimulatedTraining:
    """What a run does, in virtual seconds.

    Attributes:
        batches_s: seconds of the loader for each batch, one after another, again and again.
        step_s: device seconds of a step.
        beside_loader_s: additional device seconds of a step that is not replayed.
        launch_s: host seconds of launching a step.
        callback_s: host seconds of what the loop does after each step.
        reads_loss: whether the callback first waits for the step, as reading a loss does.
        queue_depth: batches in the loader's queue.
        max_pending: steps that the host may be ahead of an asynchronous device.
        trainer_cores: cores that the host uses for training.
        loader_cores: cores that the loader uses by itself.
        neighbour_cores: cores that processes outside the job use.
    """

    batches_s: tuple[float, ...]
    step_s: float = 0.017
    beside_loader_s: float = 0.0
    launch_s: float = 0.004
    callback_s: float = 0.0
    reads_loss: bool = True
    queue_depth: int = 2
    max_pending: int = 2
    trainer_cores: float = 0.0
    loader_cores: float = 1.0
    neighbour_cores: float = 0.0

    def twin(self) -> SimulatedTraining:
        """The same run for a synchronous device, with as many batches between loader and device.

        The host of an asynchronous device takes `max_pending` batches more than a synchronous one before it waits.
        """
        return replace(self, queue_depth=self.queue_depth + self.max_pending)

    def measure(self, asynchronous: bool, claimed: bool | None = None) -> WindowMeasurements:
        """Measures the run's windows.

        Args:
            asynchronous: whether the device is.
            claimed: what the measurement is told about that; None for the truth.
        """
        clock = VirtualClock()
        device = SimulatedDevice(clock, self.launch_s, self.max_pending, asynchronous)

        def step(batch: int) -> None:
            device.step(self.step_s + self.beside_loader_s * (batch != REPLAYED))

        def after(batch: int) -> None:
            if self.callback_s and self.reads_loss:
                device.settle()
            clock.advance(self.callback_s)

        told = asynchronous if claimed is None else claimed
        trainer = TrainerUnderTest[int](lambda batch: BATCH, step, device.settle, after, told)
        loader = simulated_loader(clock, self.batches_s, self.queue_depth)
        discard = self.queue_depth + 2
        found = measure_windows(loader, trainer, [REPLAYED], WINDOW_S, discard, ROUNDS, clock=clock)
        loader_cpu, replay_cpu = self._cpu(self.loader_cores), self._cpu(self.trainer_cores)
        return replace(found, loader_cpu=loader_cpu, replay_cpu=replay_cpu, real_cpu=loader_cpu + replay_cpu)

    def _cpu(self, cores: float) -> CpuUse:
        groups_s = {**dict.fromkeys(GROUPS, 0.0), "loader": cores * WINDOW_S}
        return CpuUse(WINDOW_S, groups_s, 0.0, self.neighbour_cores * WINDOW_S)
