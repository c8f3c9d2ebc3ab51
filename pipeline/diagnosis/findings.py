"""All that the doctor has to say: measured rates, windows and clocks in, one record and one screen out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.diagnosis.accounting import AU_THRESHOLD, LoaderThroughput, StallReport, account_stall, format_report
from pipeline.diagnosis.causes import OWN_CORES, Cause, Evidence, cause_of
from pipeline.diagnosis.predict import Action, Load, actions, limits
from pipeline.loader.augment import CROP, STORED
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.clocks import StepClocks, clock_cost_s, percentiles
from pipeline.profiling.confidence import Interval
from pipeline.profiling.stages import StageThroughput, storage_in_words
from pipeline.profiling.windows import StepTiming, WindowMeasurements
from pipeline.shards.reader import ShardSet

WAITING = 0.5  # of the time that reading takes: where it spends more off the processor, it waits for storage
BETWEEN = 0.02  # of the time: less between steps is noise
IDLE = 0.05  # cores: a trainer that takes fewer, as one that sleeps, leaves them all to the feed
LIMITS = {
    "storage": "reading",
    "feed": "the CPU time of decoding and augmenting",
    "trainer": "the training step",
    "shared cores": "the cores that feed and trainer share",
}


@dataclass(frozen=True)
class Setup:
    """What was measured on: threads and queue of a rank's feed, `cores` of this host that the job may use, `area`: how
    much of a stored picture has to be entropy decoded for a crop, relative to a square one, and how many ranks and
    hosts there are. Hosts are taken to be like this one, and to make as many images each."""

    threads: int
    queue_depth: int
    cores: int
    area: float
    ranks: int = 1
    hosts: float = 1.0


def setup_of(shards: ShardSet, settings: LoaderSettings, cores: int, ranks: int = 1, hosts: float = 1.0) -> Setup:
    """What feeds of `shards` work with."""
    width, height = shards.index["width"].astype(float), shards.index["height"].astype(float)
    area = float((width * (height + CROP) / 2).mean()) / (STORED * (STORED + CROP) / 2)
    return Setup(settings.threads, settings.queue_depth, cores, area, ranks, hosts)


@dataclass(frozen=True)
class Findings:
    """`limits` are img/s that each resource allows, lowest first. `storage`: the set's bytes, which share of it was in
    memory before (None: unknown), img/s of reading it as it was, and from memory. Waits are seconds of the real
    windows' steps, `run` the same of the whole run where there was one, its first batch and epoch edges apart.
    `rank_supplies`: img/s of each rank's own feed, where there are several. `run`, cores and memory are those of the
    rank that reports."""

    report: StallReport
    au: Interval
    au_threshold: float
    cause: Cause
    load: Load
    stages: LoaderThroughput
    storage: dict[str, Any]
    rank_supplies: tuple[float, ...]
    limits: dict[str, float]
    actions: tuple[Action, ...]
    first_wait_s: float
    waits_s: dict[str, float]
    steps_s: dict[str, float]
    run: dict[str, Any]
    cpu_cores: dict[str, float]
    memory: dict[str, int]
    fingerprint: dict[str, Any]
    steps: tuple[StepTiming, ...]

    @property
    def next_bottleneck(self) -> str:
        """What would hold training up once the first is out of the way, in words."""
        name, rate = list(self.limits.items())[1]
        return f"{LIMITS[name]}, at {rate:,.0f} img/s"

    def record(self) -> dict[str, Any]:
        """For stall.json; the report's own entries stand at the top."""
        rest = asdict(self)
        del rest["report"], rest["steps"]
        au = rest.pop("au")
        return {**self.report.record(), "au_interval": au, **rest, "next_bottleneck": self.next_bottleneck}


def build_findings(
    stages: StageThroughput,
    observed: WindowMeasurements,
    setup: Setup,
    memory: dict[str, int],
    fingerprint: dict[str, Any],
    au_threshold: float = AU_THRESHOLD,
    clocks: StepClocks | None = None,
    swapped: float | None = None,
    rank_supplies: Sequence[float] = (),
) -> Findings:
    """Puts together what was measured: the feed's stages, and windows in turn. Of several ranks all of it is of them
    together; `swapped`: img/s of the whole feed once ranks have swapped halves (None: they do not)."""
    read, decoded, full = stages.read.img_s, stages.decode.img_s, stages.full.img_s
    rates = LoaderThroughput(read, decoded, full, full if swapped is None else swapped).scaled_to(observed.supply)
    report = account_stall(rates, observed.demand, observed.clocks, au_threshold)
    load = load_of(stages, observed, setup, report, rates, stages.set_bytes < memory["available"])
    waits_s, steps_s = [step.wait_s for step in observed.steps], [step.step_s for step in observed.steps]
    return Findings(
        report,
        observed.au,
        au_threshold,
        cause_of(Evidence(report.verdict, load, (stages.read.batch_p50_s, stages.read.batch_p99_s), rank_supplies)),
        load,
        rates,
        stages.storage,
        tuple(rank_supplies),
        limits(load),
        tuple(actions(load)),
        observed.first_wait_s,
        percentiles(waits_s),
        percentiles(steps_s),
        {} if clocks is None else run_record(clocks),
        observed.real_cpu.cores(),
        memory,
        fingerprint,
        observed.steps,
    )


def load_of(
    stages: StageThroughput,
    observed: WindowMeasurements,
    setup: Setup,
    report: StallReport,
    rates: LoaderThroughput,
    fits: bool,
) -> Load:
    """CPU time by stage is shared out as the stages apart had it; all of it together is the windows' own: of this host,
    whose images are one part in `setup.hosts`."""
    read_ms, decoded_ms, full_ms = (r.cpu_ms_per_img for r in (stages.read, stages.decode, stages.full))
    feed_s, trainer_s = setup.hosts * observed.feed_cpu_s, setup.hosts * observed.replay_cpu_s
    scale = feed_s / max(full_ms, 1e-9)
    read_s = scale * min(read_ms, full_ms)
    decode_s = scale * max(0.0, min(decoded_ms, full_ms) - read_ms)
    clocks = observed.clocks
    between_s = report.parts["unexplained"] / report.together
    uneven_s = max(0.0, clocks.wait_s / clocks.images - max(0.0, 1 / observed.supply - 1 / observed.demand))
    waiting = 1 - stages.read.img_s / setup.ranks * read_ms / 1000
    bound = report.verdict == "input-bound: storage" or waiting > WAITING
    return Load(
        threads=setup.ranks * setup.threads,
        cores=setup.hosts * setup.cores,
        neighbours=setup.hosts * observed.feed_cpu.cores()["neighbours"],
        storage_s=1 / rates.read if bound else 0.0,
        read_s=read_s,
        decode_s=decode_s,
        augment_s=max(0.0, feed_s - read_s - decode_s),
        trainer_s=trainer_s if trainer_s * observed.demand > IDLE else 0.0,
        demand=observed.demand,
        supply=max(observed.supply, report.together),  # what it gave to the trainer it can give
        together=report.together,
        area=setup.area,
        queue_depth=setup.queue_depth,
        warm_s=1 / stages.reread.img_s,
        fits=fits,
        between_s=between_s if between_s * report.together > BETWEEN else 0.0,
        # a trainer on the feed's cores waits for these
        uneven_s=0.0 if trainer_s * observed.demand > OWN_CORES else uneven_s,
        ranks=setup.ranks,
        hosts=setup.hosts,
    )


def run_record(clocks: StepClocks) -> dict[str, Any]:
    """Of a whole run: img/s, the share of its time that the clocks cost, waits and steps in seconds; the wait for its
    first batch and those at epochs' edges; gaps between steps, and steps, by the clock of a GPU, None without one."""
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
    }


def details(found: Findings) -> dict[str, str]:
    """What was measured beside rates and AU, in words, by name."""
    waits, cores, load = found.waits_s, found.cpu_cores, found.load
    other_ranks = f" other ranks {cores['rest of job']:.2f}," if load.ranks > 1 else ""
    lines = {
        "storage": storage_in_words(found.storage),
        "waits": f"p50 {_ms(waits['p50'])}, p95 {_ms(waits['p95'])}, p99 {_ms(waits['p99'])} a step;"
        f" first batch {_ms(found.first_wait_s)}",
        "cores": f"feed {cores['feed']:.2f}, main {cores['main']:.2f}, others {cores['others']:.2f},{other_ranks}"
        f" neighbours {cores['neighbours']:.2f}, of {load.cores / load.hosts:g}",
        "memory": f"{found.memory['resident'] / 2**30:.2f} GiB resident, {found.memory['shared'] / 2**30:.2f} shared",
    }
    if run := found.run:
        lines["run"] = (
            f"{run['img_s']:,.0f} img/s while it lasted; first batch {_ms(run['first_wait_s'])};"
            f" its clocks took {run['clocks_share']:.4%}"
        )
    if edges := found.run.get("edge_waits_s"):
        lines["edges"] = f"waits of the run where epochs began: p50 {_ms(edges['p50'])}, max {_ms(edges['max'])}"
    if gaps := found.run.get("device_gaps_s"):
        lines["device"] = (
            f"gaps p50 {_ms(gaps['p50'])}, p95 {_ms(gaps['p95'])}, p99 {_ms(gaps['p99'])} between steps of"
            f" {_ms(found.run['device_steps_s']['p50'])}; where no wait is as long, the host's"
        )
    return lines


def format_findings(found: Findings) -> str:
    """One screen."""
    lines = [
        format_report(found.report),
        f"AU         {found.au}; the bar is {found.au_threshold:.0%}",
        f"cause      {found.cause.name}: {found.cause.because}",
        *(f"{name:<11}{words}" for name, words in details(found).items()),
        *(f"action {n}   {action}" for n, action in enumerate(found.actions[:4], 1)),
    ]
    return "\n".join([*lines, f"then       the next bottleneck is {found.next_bottleneck}"])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
