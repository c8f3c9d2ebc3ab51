"""The stall report for a loader and a training step of any make, in one call.

    from pipeline.diagnosis.any_loader import diagnose
    print(diagnose(loader, step))

`loader` is any iterable of batches: a torch DataLoader, a webdataset.WebLoader, a list. `step` trains on one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from pipeline.diagnosis.accounting import (
    AU_THRESHOLD,
    INDISTINCT,
    LoaderThroughput,
    StallAccount,
    account_stall,
    format_account,
)
from pipeline.diagnosis.loader_rules import (
    LIMITS,
    LoaderAction,
    LoaderCause,
    LoaderEvidence,
    LoaderFacts,
    actions_for,
    cause_of_slow_loader,
    contention_of,
    facts_of,
)
from pipeline.host import read_host
from pipeline.profiling.any_loader import EndlessLoader, ProcessCpu, ProcessWatch, delay_ratio, images_of
from pipeline.profiling.cpu_time import CpuUse
from pipeline.profiling.group import SINGLE_PROCESS
from pipeline.profiling.pacing import PacedWindows
from pipeline.profiling.windows import WINDOW_ROUNDS, TrainerUnderTest, WindowMeasurements, measure_windows

REPLAYED_BATCHES = 4  # enough that none stays in a processor's cache
WORKER_SHARE = 0.02  # of the children's CPU time: a child that uses less is no worker
B = TypeVar("B")


@dataclass(frozen=True)
class Observed:
    """What was seen of a loader besides its windows.

    Attributes:
        facts: its own settings.
        batch: images of its first batch.
        processes: CPU time of its processes in all windows.
        epoch_ends: how often it had to start again.
        restart_s: mean seconds of that; 0 if it never ended.
        restart_share: share of the loader's time that this adds.
        delay_ratio: see `LoaderEvidence`.
    """

    facts: LoaderFacts
    batch: int
    processes: tuple[ProcessCpu, ...]
    epoch_ends: int
    restart_s: float
    restart_share: float
    delay_ratio: float | None = None

    @property
    def workers(self) -> int:
        """Its worker processes: as many as it says, or as many as have worked."""
        if self.facts.num_workers is not None:
            return self.facts.num_workers
        used_s = sum(process.cpu_s for process in self.processes)
        return sum(process.pid > 0 and process.cpu_s >= WORKER_SHARE * used_s for process in self.processes)


@dataclass(frozen=True)
class LoaderReport:
    """The stall report of any loader; `print` shows it.

    Attributes:
        account: figures, parts and verdict.
        au_interval: of AU, as text.
        cause: what limits the loader, if training waits for it.
        actions: what to change, the most promising change first.
        evidence: what the rules looked at.
        observed: processes and epochs.
        waits_s: seconds of the measured steps' waits, in their order.
    """

    account: StallAccount
    au_interval: str
    cause: LoaderCause
    actions: tuple[LoaderAction, ...]
    evidence: LoaderEvidence
    observed: Observed
    waits_s: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """The report as a record for JSON."""
        rest = {name: asdict(getattr(self, name)) for name in ("cause", "evidence", "observed")}
        actions = [asdict(action) for action in self.actions]
        return {**self.account.record(), **rest, "actions": actions, "au_interval": self.au_interval}

    def __str__(self) -> str:
        first = str(self.actions[0]) if self.actions else "the loader keeps up; only a faster step trains faster"
        if self.account.verdict.startswith(INDISTINCT):
            first = f"measure for longer to decide; if training waits: {self.account.leaning}, {first}"
        lines = [
            f"verdict    {self.account.verdict}",
            f"           {first}",
            "",
            format_account(self.account),
            f"AU         {self.au_interval}",
            f"cause      {self.cause.name}: {self.cause.because}",
            *describe(self.evidence, self.observed),
            *(f"action {number}   {action}" for number, action in enumerate(self.actions, 1)),
        ]
        return "\n".join(lines)


def describe(e: LoaderEvidence, observed: Observed) -> list[str]:
    """The lines about the loader itself."""
    facts = ", ".join(f"{k}={v}" for k, v in asdict(observed.facts).items() if k != "kind" and v is not None)
    cores = f"workers {e.worker_cores:.2f}, main thread {e.main_cores:.2f}, other threads {e.thread_cores:.2f}"
    lines = [
        f"loader     {observed.facts.kind.rpartition('.')[2]}({facts})",
        f"batches    of {observed.batch} images, {e.cpu_ms:.2f} CPU ms an image",
        f"cores      {cores}, neighbours {e.neighbour_cores:.2f}, of {e.cores:g}; trainer {e.trainer_cores:.2f}",
    ]
    if observed.processes:
        by_name = dict[str, list[float]]()
        for process in observed.processes:
            by_name.setdefault(process.name, []).append(process.cpu_s)
        texts = [f"{len(s)} x {name}: {min(s):.1f} to {max(s):.1f} CPU s" for name, s in by_name.items()]
        lines.append(f"processes  {'; '.join(texts)}")
    if observed.epoch_ends:
        share = f"{observed.restart_share:.0%} of the loader's time"
        lines.append(
            f"epochs     ended {observed.epoch_ends} times; the next batch took {observed.restart_s:.2f} s, {share}"
        )
    return lines


def diagnose(
    loader: Iterable[B] | Callable[[], Iterable[B]],
    step: Callable[[B], object],
    *,
    settle: Callable[[], object] | None = None,
    batch: int | None = None,
    window_s: float = 1.0,
    rounds: int = WINDOW_ROUNDS,
    au_threshold: float = AU_THRESHOLD,
    progress: Callable[[int], None] = lambda n: None,
    clock: Callable[[], float] = time.perf_counter,
) -> LoaderReport:
    """Measures a loader alone, a training step on replayed batches and both together, and explains the difference.

    Args:
        loader: gives batches: an iterable, or a function that makes one.
        step: trains on one batch, as the training loop does. The measured steps train the model on.
        settle: waits until the device has finished, e.g. `torch.cuda.synchronize`; required if `step` returns before.
        batch: images of a batch; None to take the length of the first array in it.
        window_s: seconds of each measurement; the whole diagnosis takes about 4 * rounds of them.
        rounds: how often each window is repeated, at least 2.
        au_threshold: from this AU on training does not wait.
        progress: called with 1 after each round.
        clock: gives the time in seconds.

    Raises:
        ValueError: the loader gives no batch, or ends and cannot start again.
    """
    batches, watch = EndlessLoader(loader, clock), ProcessWatch()
    facts, replayed = facts_of(batches.source), batches.few(REPLAYED_BATCHES)

    def size(one: B) -> int:
        return images_of(one) if batch is None else batch

    images = size(replayed[0])
    trainer = TrainerUnderTest(size, step, settle or (lambda: None), asynchronous=settle is not None)
    measured = measure_windows(
        batches, trainer, replayed, window_s, facts.prefetched, rounds, progress, SINGLE_PROCESS, clock
    )
    observed = observe(batches, facts, images, watch, measured.supply)
    return report_of(measured, observed, au_threshold, read_host().cores)


def observe(batches: EndlessLoader[B], facts: LoaderFacts, images: int, watch: ProcessWatch, supply: float) -> Observed:
    """What was seen of a loader, after its windows."""
    ends = len(batches.restarts_s)
    restart_s = sum(batches.restarts_s) / ends if ends else 0.0
    share, children = batches.restart_share(images / supply, max(1, facts.num_workers or 1)), watch.children()
    ratio = delay_ratio(children or [watch.own()])
    return Observed(facts, images, tuple(children), ends, restart_s, share, ratio)


def report_of(measured: WindowMeasurements, observed: Observed, au_threshold: float, cores: float) -> LoaderReport:
    """Diagnoses what was measured; no clock is read."""
    evidence = evidence_of(measured.loader_cpu, measured.replay_cpu, observed, measured.supply, measured.demand, cores)
    slow, supply = cause_of_slow_loader(evidence), measured.supply
    # The accounting knows stages. Only their sum is known here: all of the loader's own slowness is one part.
    whole = LoaderThroughput(supply, supply, supply, supply)
    account = account_stall(whole, measured.demand, measured.clocks, au_threshold, measured.au)
    own = account.parts["storage"]
    parts = dict.fromkeys(("waiting", "CPU work", "epoch ends"), 0.0) | {LIMITS[slow.name]: own}
    parts |= {name: account.parts[name] for name in ("contention", "unexplained")}
    verdict, leaning = (text.replace("storage", LIMITS[slow.name]) for text in (account.verdict, account.leaning))
    account = replace(account, parts=parts, verdict=verdict, leaning=leaning)
    cause, actions = _judged(leaning, slow, evidence)
    waits_s = tuple(step.wait_s for step in measured.steps)
    return LoaderReport(account, str(measured.au), cause, tuple(actions), evidence, observed, waits_s)


def _judged(verdict: str, slow: LoaderCause, e: LoaderEvidence) -> tuple[LoaderCause, list[LoaderAction]]:
    """Cause and actions of a verdict."""
    if verdict == "compute-bound":
        return LoaderCause("none", "the loader keeps up with the trainer"), []
    if verdict == "unexplained":
        because = "time passes neither in the loader nor in the step"
        return LoaderCause("other work", because), [LoaderAction("look at what the loop does between steps")]
    if verdict == "contention":
        return contention_of(e)
    return slow, actions_for(slow, e)


def evidence_of(
    loader_cpu: CpuUse, replay_cpu: CpuUse | None, observed: Observed, supply: float, demand: float, cores: float
) -> LoaderEvidence:
    """The evidence for the rules; `replay_cpu` is None without a trainer."""
    used, in_processes = loader_cpu.cores(), observed.workers > 0  # the group "loader" has workers, or DALI's threads
    return LoaderEvidence(
        supply=supply,
        demand=demand,
        facts=observed.facts,
        cores=cores,
        workers=observed.workers,
        worker_cores=used["rest of job"] + used["loader"] * in_processes,
        main_cores=used["main"],
        thread_cores=used["others"] + used["loader"] * (not in_processes),
        neighbour_cores=used["neighbours"],
        trainer_cores=replay_cpu.own_s / replay_cpu.wall_s if replay_cpu else 0.0,
        restart_share=observed.restart_share,
        delay_ratio=observed.delay_ratio,
    )


def measure_alone(
    loader: Iterable[B] | Callable[[], Iterable[B]],
    *,
    batch: int | None = None,
    window_s: float = 1.0,
    rounds: int = WINDOW_ROUNDS,
    progress: Callable[[int], None] = lambda n: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[LoaderEvidence, Observed]:
    """Measures a loader without a trainer; arguments and errors are those of `diagnose`. Its demand is infinite."""
    batches, watch = EndlessLoader(loader, clock), ProcessWatch()
    facts, (first,) = facts_of(batches.source), batches.few(1)
    images = images_of(first) if batch is None else batch

    def drain(number: int) -> int:
        return sum(images_of(one) if batch is None else batch for one in batches.few(number))

    drain(facts.prefetched)
    windows, img_s = PacedWindows(window_s, SINGLE_PROCESS, clock), []
    for _ in range(rounds):
        img_s.append(windows.throughput("loader", drain))
        progress(1)
    supply = rounds / sum(1 / one for one in img_s)  # windows of equal length in images
    observed = observe(batches, facts, images, watch, supply)
    return evidence_of(windows.use("loader"), None, observed, supply, float("inf"), read_host().cores), observed
