"""The findings of a stall report: measured stages, windows and clocks in, one record and one screen of text out.

The reasoning is one chain: `accounting` gives figures, parts and verdict; `causes` names the cause from the evidence;
`predict` ranks the actions and derives the advice from the cause and the first action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from pipeline.diagnosis.accounting import AU_THRESHOLD, LoaderThroughput, StallAccount, account_stall, format_account
from pipeline.diagnosis.causes import Cause, Evidence, cause_of
from pipeline.diagnosis.predict import LIMITS, Action, advice, ranked_actions, resource_limits
from pipeline.diagnosis.workload import LoaderSetup, Workload, workload_of
from pipeline.profiling.clocks import StepClocks, StepTiming, clock_cost_s, percentiles
from pipeline.profiling.confidence import Interval
from pipeline.profiling.stages import StageThroughput, format_storage
from pipeline.profiling.windows import WindowMeasurements

MAX_PRINTED_ACTIONS = 4
HOST_CLOCKS, QUEUE, CUDA_EVENTS = "host clocks", "host clocks and the device's queue", "CUDA events"
SCREEN_WIDTH = 120


@dataclass(frozen=True)
class Findings:
    """Everything that a stall report says.

    Attributes:
        account: figures, parts and verdict.
        au: mean AU of the rounds, with its confidence interval.
        au_threshold: the AU from which on training does not wait.
        cause: the likely cause of the stall.
        actions: changes worth making, best first.
        advice: the line under the verdict, derived from `cause` and the first action.
        workload: what an image costs and what there is to pay it with.
        loader_img_s: the loader alone, cut short after each stage.
        storage: what distinguishes cold reads from warm ones, see `StageThroughput.storage`.
        limits_img_s: img/s that each resource allows by itself, lowest first.
        first_wait_s: seconds that the first batch of the measurement took.
        device: whether it is asynchronous and what the figures rest on, see `device_record`.
        waits_s: percentiles of the host's waits in real steps, in seconds.
        steps_s: percentiles of the host's time in real training steps, in seconds.
        run: figures of the whole run, see `run_record`; empty if there was no run.
        cpu_cores: cores in use by each group of threads while loader and trainer worked, on this host.
        memory: bytes of this process, see `memory_use`.
        environment: machine, settings and shard set of the measurement.
        steps: the last real steps, for the timeline.
    """

    account: StallAccount
    au: Interval
    au_threshold: float
    cause: Cause
    actions: tuple[Action, ...]
    advice: str
    workload: Workload
    loader_img_s: LoaderThroughput
    storage: dict[str, Any]
    limits_img_s: dict[str, float]
    first_wait_s: float
    device: dict[str, Any]
    waits_s: dict[str, float]
    steps_s: dict[str, float]
    run: dict[str, Any]
    cpu_cores: dict[str, float]
    memory: dict[str, int]
    environment: dict[str, Any]
    steps: tuple[StepTiming, ...]

    @property
    def next_bottleneck(self) -> str:
        """What would limit training once the first bottleneck is removed, in words."""
        name, img_s = list(self.limits_img_s.items())[1]
        return f"{LIMITS[name]}, at {img_s:,.0f} img/s"

    def record(self) -> dict[str, Any]:
        """The record for stall.json. The entries of the account are at its top level."""
        rest = asdict(self)
        del rest["account"], rest["steps"]
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
    account = account_stall(loader, measured.demand, measured.clocks, au_threshold)
    workload = workload_of(stages, measured, setup, account, loader, memory["available"], tuple(rank_supplies))
    cause, actions = diagnosis_of(account, workload, stages)
    return Findings(
        account=account,
        au=measured.au,
        au_threshold=au_threshold,
        cause=cause,
        actions=tuple(actions),
        advice=advice(workload, cause, actions),
        workload=workload,
        loader_img_s=loader,
        storage=stages.storage,
        limits_img_s=resource_limits(workload),
        first_wait_s=measured.first_wait_s,
        device=device_record(measured.asynchronous, clocks),
        waits_s=percentiles([step.wait_s for step in measured.steps]),
        steps_s=percentiles([step.step_s for step in measured.steps]),
        run=run_record(clocks, measured.asynchronous) if clocks else {},
        cpu_cores=measured.real_cpu.cores(),
        memory=memory,
        environment=environment,
        steps=measured.steps,
    )


def diagnosis_of(account: StallAccount, workload: Workload, stages: StageThroughput) -> tuple[Cause, list[Action]]:
    """The cause of the verdict, and the actions that follow from it."""
    cause = cause_of(Evidence(account.verdict, workload, (stages.read.batch_p50_s, stages.read.batch_p99_s)))
    return cause, ranked_actions(workload, cause)


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


def run_record(clocks: StepClocks, asynchronous: bool) -> dict[str, Any]:
    """Figures of a whole run.

    Returns:
        `img_s`; `clocks_share`, the share of the time that the clocks cost; `first_wait_s`; and percentiles in seconds:
        `edge_waits_s` (first batch of each later epoch), `waits_s`, `steps_s` (all by the host's clocks),
        `device_gaps_s` and `device_steps_s` (by the GPU's clock); `idle_shares`, see there. Entries without a value
        are None.
    """
    total = clocks.total()
    return {
        "img_s": total.images / total.elapsed_s,
        "clocks_share": clock_cost_s() * clocks.steps / total.elapsed_s,
        "first_wait_s": clocks.first_wait_s,
        "edge_waits_s": percentiles(clocks.edge_waits_s) if clocks.edge_waits_s else None,
        "waits_s": percentiles(clocks.waits_s),
        "steps_s": percentiles(clocks.steps_s),
        "device_gaps_s": percentiles(clocks.device_gaps_s) if clocks.device_gaps_s else None,
        "device_steps_s": percentiles(clocks.device_steps_s) if clocks.device_steps_s else None,
        "idle_shares": idle_shares(clocks, asynchronous),
    }


def secondary_lines(found: Findings) -> dict[str, str]:
    """What was measured besides throughput and AU: lines of text by name."""
    waits, cores, memory = found.waits_s, found.cpu_cores, found.memory
    usable = found.workload.cores / found.workload.hosts
    other_ranks = f" other ranks {cores['rest of job']:.2f}," if found.workload.ranks > 1 else ""
    host = "host: " if found.device["asynchronous"] else ""
    lines = {
        "storage": format_storage(found.storage),
        "evidence": _evidence_line(found.device),
        "waits": f"{host}p50 {_ms(waits['p50'])}, p95 {_ms(waits['p95'])}, p99 {_ms(waits['p99'])} a step;"
        f" first batch {_ms(found.first_wait_s)}",
        "cores": f"loader {cores['loader']:.2f}, main thread {cores['main']:.2f}, other threads {cores['others']:.2f},"
        f"{other_ranks} neighbours {cores['neighbours']:.2f}, of {usable:g}",
        "memory": f"{memory['resident'] / 2**30:.2f} GiB resident, {memory['shared'] / 2**30:.2f} shared",
    }
    if decoding := found.environment.get("hardware_decoding"):  # of a GPU
        lines["decoder"] = f"JPEG engines active: {decoding['active']}; {decoding['because']}"
    return lines | (_run_lines(found.run) if found.run else {})


def _evidence_line(device: dict[str, Any]) -> str:
    if not device["asynchronous"]:
        return "host clocks; the device is synchronous: a step returns when it is done"
    run = f"; the run: {device['run']}" * (device["run"] is not None)
    return f"host clocks; the device is asynchronous: a wait counts once the device's queue is empty{run}"


def _run_lines(run: dict[str, Any]) -> dict[str, str]:
    lines = {
        "run": f"{run['img_s']:,.0f} img/s over the whole run; first batch {_ms(run['first_wait_s'])};"
        f" the clocks took {run['clocks_share']:.4%} of its time"
    }
    if edges := run["edge_waits_s"]:
        lines["edges"] = f"waits for the first batch of later epochs: p50 {_ms(edges['p50'])}, max {_ms(edges['max'])}"
    if gaps := run["device_gaps_s"]:
        lines["device"] = (
            f"gaps p50 {_ms(gaps['p50'])}, p95 {_ms(gaps['p95'])}, p99 {_ms(gaps['p99'])} between steps of"
            f" {_ms(run['device_steps_s']['p50'])}; idle {run['idle_shares']['input']:.1%} for input,"
            f" {run['idle_shares']['host']:.1%} for the host"
        )
    return lines


def format_findings(found: Findings) -> str:
    """The stall report as one screen of text."""
    lines = [
        f"verdict    {found.account.verdict}",
        *(f"{'':<11}{line}" for line in wrap(found.advice, SCREEN_WIDTH - 11)),
        "",
        format_account(found.account),
        f"AU         {found.au}; threshold {found.au_threshold:.0%}",
        f"cause      {found.cause.name}: {found.cause.because}",
        *(f"{name:<11}{text}" for name, text in secondary_lines(found).items()),
        *(f"action {n}   {action}" for n, action in enumerate(found.actions[:MAX_PRINTED_ACTIONS], 1)),
        f"then       the next bottleneck is {found.next_bottleneck}",
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
