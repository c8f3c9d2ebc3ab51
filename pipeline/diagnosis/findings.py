"""The findings of a stall report: measured stages, windows and clocks in, one record out; `screen` turns it into text.

The reasoning is one chain: `accounting` gives figures, parts and verdict; `causes` names the cause from the evidence;
`predict` ranks the actions and derives the advice from the cause and the first action. A run that the windows after it
do not explain gets verdict, cause and advice from its own clocks (`run_account`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.diagnosis.accounting import AU_THRESHOLD, INDISTINCT, LoaderThroughput, StallAccount, account_stall
from pipeline.diagnosis.causes import Evidence, cause_of
from pipeline.diagnosis.predict import LIMITS, advice, ranked_actions, resource_limits
from pipeline.diagnosis.run_account import Judgement, RunCheck, check_run, epoch_rates, judge_run
from pipeline.diagnosis.workload import LoaderSetup, Workload, workload_of
from pipeline.host import Host, Pressure
from pipeline.profiling.clocks import StepClocks, StepTiming, clock_cost_s, percentiles
from pipeline.profiling.cpu_time import CpuUse
from pipeline.profiling.stages import StageThroughput
from pipeline.profiling.windows import WindowMeasurements

HOST_CLOCKS, QUEUE, CUDA_EVENTS = "host clocks", "host clocks and the device's queue", "CUDA events"
ROUND_FIGURES = ("supply", "demand", "together")
LONG_PAUSES_SHARE = 0.1  # of a run's time: from here on the advice mentions validation and checkpoints


@dataclass(frozen=True)
class Findings(Judgement):
    """Everything that a stall report says.

    Attributes:
        windows: figures, parts and verdict of the windows. `account` is the run's if they do not explain it.
        rounds_img_s: supply, demand and together of each round of the windows.
        au_threshold: the AU from which on training does not wait.
        workload: what an image costs and what there is to pay it with.
        loader_img_s: the loader alone, cut short after each stage.
        storage: what distinguishes cold reads from warm ones, see `StageThroughput.storage`.
        first_wait_s: seconds that the first batch of the measurement took.
        device: whether it is asynchronous and what the figures rest on, see `device_record`.
        run: figures of the whole run, see `run_record`; empty if there was no run.
        check: whether the windows explain the run; None without a run, or for a very short one.
        host: cores and memory that the job may use on this host.
        cpu: CPU use and pressure while loader and trainer worked, on this host.
        memory: bytes of this process, see `memory_use`.
        environment: machine, settings and shard set of the measurement.
        steps: the last real steps, for the timeline.
    """

    windows: StallAccount
    rounds_img_s: dict[str, list[float]]
    au_threshold: float
    workload: Workload
    loader_img_s: LoaderThroughput
    storage: dict[str, Any]
    first_wait_s: float
    device: dict[str, Any]
    run: dict[str, Any]
    check: RunCheck | None
    host: Host
    cpu: CpuUse
    memory: dict[str, int]
    environment: dict[str, Any]
    steps: tuple[StepTiming, ...]

    @property
    def waits_s(self) -> dict[str, float]:
        """Percentiles of the host's waits in real steps, in seconds."""
        return percentiles([step.wait_s for step in self.steps])

    @property
    def steps_s(self) -> dict[str, float]:
        """Percentiles of the host's time in real training steps, in seconds."""
        return percentiles([step.step_s for step in self.steps])

    @property
    def limits_img_s(self) -> dict[str, float]:
        """img/s that each resource allows by itself, lowest first."""
        return resource_limits(self.workload)

    @property
    def cpu_cores(self) -> dict[str, float]:
        """Cores in use by each group of threads while loader and trainer worked, on this host."""
        return self.cpu.cores()

    @property
    def pressure(self) -> Pressure:
        """What the kernel counted while loader and trainer worked."""
        return self.cpu.pressure

    @property
    def next_bottleneck(self) -> str:
        """What would limit training once the first bottleneck is removed, in words."""
        name, img_s = list(self.limits_img_s.items())[1]
        return f"{LIMITS[name]}, at {img_s:,.0f} img/s"

    def record(self) -> dict[str, Any]:
        """The record for stall.json. The entries of the account are at its top level."""
        rest = asdict(self)
        for name in ("account", "steps", "check", "cpu"):
            del rest[name]
        rest |= {"waits_s": self.waits_s, "steps_s": self.steps_s, "limits_img_s": self.limits_img_s}
        rest |= {"host": {**self.host.record(), **self.pressure.record()}, "cpu_cores": self.cpu_cores}
        au, rank_supplies = rest.pop("au"), rest["workload"].pop("rank_supplies")
        extra = {"au_interval": au, "rank_supplies": rank_supplies, "next_bottleneck": self.next_bottleneck}
        return {**self.account.record(), **rest, **extra}


def build_findings(
    stages: StageThroughput,
    measured: WindowMeasurements,
    setup: LoaderSetup,
    memory: dict[str, int],
    environment: dict[str, Any],
    au_threshold: float = AU_THRESHOLD,
    clocks: StepClocks | None = None,
    swapped: float | None = None,
    rank_supplies: Sequence[float] = (),
) -> Findings:
    """Diagnoses what was measured. With several ranks all figures are of all ranks together.

    Args:
        stages: the loader cut short after each stage.
        measured: the windows.
        setup: what the loaders work with.
        memory: see `memory_use`.
        environment: machine, settings and shard set.
        au_threshold: from this AU on training does not wait.
        clocks: of the whole run, if there was one.
        swapped: img/s of the loader after ranks have swapped halves; None without a swap.
        rank_supplies: img/s of each rank's own loader; empty for one rank.
    """
    loader = loader_throughput(stages, swapped).scaled_to(measured.supply)
    windows = account_stall(loader, measured.demand, measured.clocks, au_threshold, measured.au)
    workload = workload_of(stages, measured, setup, windows, loader, tuple(rank_supplies))
    check, judged = check_run(clocks, measured), _judge_windows(windows, workload, stages, measured, setup.host)
    if clocks and check and not check.explained:
        judged = judge_run(check, clocks, measured, loader, workload.shared_cores / setup.hosts, au_threshold)
    run = run_record(clocks, measured.asynchronous, check) if clocks else {}
    return Findings(
        **vars(replace(judged, advice=judged.advice + _pauses_advice(run))),
        windows=windows,
        rounds_img_s={name: [getattr(one, name) for one in measured.rounds] for name in ROUND_FIGURES},
        au_threshold=au_threshold,
        workload=workload,
        loader_img_s=loader,
        storage=stages.storage,
        first_wait_s=measured.first_wait_s,
        device=device_record(measured.asynchronous, clocks),
        run=run,
        check=check,
        host=setup.host,
        cpu=measured.real_cpu,
        memory=memory,
        environment=environment,
        steps=measured.steps,
    )


def _judge_windows(
    account: StallAccount, workload: Workload, stages: StageThroughput, measured: WindowMeasurements, host: Host
) -> Judgement:
    """The diagnosis of the windows."""
    evidence = Evidence(
        account.leaning,
        workload,
        (stages.read.batch_p50_s, stages.read.batch_p99_s),
        stages.probe,
        host,
        measured.real_cpu.pressure,
        stages.set_bytes,
    )
    cause = cause_of(evidence)
    actions = ranked_actions(workload, cause)
    said = advice(workload, cause, actions)
    if account.verdict.startswith(INDISTINCT):
        said = f"measure for longer to decide; if training waits: {account.leaning}, {said}"
    return Judgement(account, measured.au, cause, tuple(actions), said)


def _pauses_advice(run: dict[str, Any]) -> str:
    """What to add to the advice about a run that spends a large share of its time in pauses."""
    pauses = {name: share for name, share in run.get("shares", {}).items() if name in run["pauses_s"]}
    if not pauses or sum(pauses.values()) < LONG_PAUSES_SHARE:
        return ""
    text = " and ".join(f"{name} {share:.0%}" for name, share in pauses.items())
    return f"; of the whole run, {text} of the time, which AU does not count"


def loader_throughput(stages: StageThroughput, swapped: float | None) -> LoaderThroughput:
    """The loader alone, as the stages show it; `swapped` is its img/s with halves swapped between ranks."""
    full = stages.full.img_s
    return LoaderThroughput(stages.read.img_s, stages.decode.img_s, full, swapped or full)


def device_record(asynchronous: bool, clocks: StepClocks | None) -> dict[str, Any]:
    """What the figures rest on.

    Returns:
        `asynchronous`: whether steps are only launched on the device; `windows` and `run`: the evidence for the figures
        of the windows and of the whole run. `run` is None without a run, and without evidence: on an asynchronous
        device the host's clocks alone say nothing about the device.
    """
    run = None
    if clocks is not None:
        run = CUDA_EVENTS if clocks.device_gaps_s else None if asynchronous else HOST_CLOCKS
    return {"asynchronous": asynchronous, "windows": QUEUE if asynchronous else HOST_CLOCKS, "run": run}


def idle_shares(clocks: StepClocks, asynchronous: bool) -> dict[str, float] | None:
    """Shares of a run's time for which the device had no step, by reason: "input" and "host" (anything else).

    None if there is no evidence: an asynchronous device without CUDA events.
    """
    total, by_events = clocks.total(), clocks.idle_by_events()
    if by_events is None and asynchronous:
        return None
    input_s, host_s = by_events or (total.wait_s, max(0.0, total.elapsed_s - total.wait_s - total.step_s))
    return {"input": input_s / total.elapsed_s, "host": host_s / total.elapsed_s}


def run_record(clocks: StepClocks, asynchronous: bool, check: RunCheck | None) -> dict[str, Any]:
    """Figures of a whole run.

    Returns:
        `img_s`; `clocks_share`, the share of the time that the clocks cost; `first_wait_s`; and percentiles in seconds:
        `edge_waits_s` (first batch of each later epoch), `waits_s`, `steps_s` (all by the host's clocks),
        `device_gaps_s` and `device_steps_s` (by the GPU's clock); `idle_shares`, see there. `shares` of the whole run's
        time, which add up to 1: `steps`, `waits`, `between` and each kind of pause; `pauses_s`: the seconds of every
        pause, by kind; `epochs_img_s`: img/s of each epoch; `explained`: whether the windows explain the run, and
        `slow`: the part that was slower, see `Spell`. Entries without a value are None.
    """
    total = clocks.total()
    pauses_s = {name: sum(seconds) for name, seconds in clocks.pauses_s.items()}
    spent_s = {"steps": total.step_s, "waits": total.wait_s}
    spent_s["between"] = max(0.0, total.elapsed_s - sum(spent_s.values()))
    whole_s = sum(spent_s.values()) + sum(pauses_s.values())
    marks_s = clocks.marks.spent_s if clocks.marks else 0.0
    return {
        "img_s": total.images / total.elapsed_s,
        "clocks_share": (clock_cost_s() * clocks.steps + marks_s) / total.elapsed_s,
        "first_wait_s": clocks.first_wait_s,
        "edge_waits_s": percentiles(clocks.edge_waits_s) if clocks.edge_waits_s else None,
        "waits_s": percentiles(clocks.waits_s),
        "steps_s": percentiles(clocks.steps_s),
        "device_gaps_s": percentiles(clocks.device_gaps_s) if clocks.device_gaps_s else None,
        "device_steps_s": percentiles(clocks.device_steps_s) if clocks.device_steps_s else None,
        "idle_shares": idle_shares(clocks, asynchronous),
        "shares": {name: seconds / whole_s for name, seconds in {**spent_s, **pauses_s}.items()},
        "pauses_s": clocks.pauses_s,
        "epochs_img_s": epoch_rates(clocks),
        "explained": None if check is None else check.explained,
        "slow": None if check is None or check.spell is None else asdict(check.spell),
    }
