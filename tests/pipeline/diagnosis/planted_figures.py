"""Made-up measurements of a loader and a trainer with one thing wrong, by the name of what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.diagnosis.findings import Findings, build_findings
from pipeline.diagnosis.workload import LoaderSetup
from pipeline.host import Host, Pressure
from pipeline.profiling.clocks import LoopTotals, StepTiming, percentiles
from pipeline.profiling.cpu_time import GROUPS, CpuUse
from pipeline.profiling.stages import StageThroughput
from pipeline.profiling.storage_probe import StorageProbe
from pipeline.profiling.throughput import Throughput
from pipeline.profiling.windows import WindowMeasurements, WindowRound

CORES = 4
DEMAND = 2000.0  # img/s
WINDOW_S = 2.0
BATCH = 128
CALM = Pressure(WINDOW_S)
SET_BYTES = 10**9
MEMORY = {"resident": 1, "shared": 1, "available": 2 * SET_BYTES}
HOST = Host(CORES, CORES, None, 4 * SET_BYTES, None, 2 * SET_BYTES)
SETUP = LoaderSetup(threads=4, queue_depth=2, cores=CORES, decode_area_ratio=1.4, host=HOST)
SMALL_HOST = replace(HOST, machine_bytes=SET_BYTES, available_bytes=SET_BYTES // 2)
EDGES_S = percentiles([0.31, 0.32])
RUN = {"img_s": 654.3, "clocks_share": 1e-6, "first_wait_s": 0.2}
RUN |= dict.fromkeys(("edge_waits_s", "waits_s", "device_gaps_s", "device_steps_s"), EDGES_S)
RUN |= {"idle_shares": {"input": 0.123, "host": 0.045}, "epochs_img_s": [111.5, 222.5]}
RUN |= {
    "shares": {"steps": 0.71, "waits": 0.12, "between": 0.01, "validation": 0.16},
    "pauses_s": {"validation": [31.0]},
}


def throughput(img_s: float, cpu_ms: float, p50_s: float = 0.01, p99_s: float = 0.012) -> Throughput:
    return Throughput(img_s, img_s, img_s, cpu_ms, img_s * cpu_ms / 1000, (img_s,), p50_s, p99_s)


def stages(
    read: Throughput, decode_ms: float = 0.8, augment_ms: float = 0.2, threads: int = CORES, reread: float = 0.0
) -> StageThroughput:
    """A loader whose work takes these CPU milliseconds. It reads as fast from memory unless `reread` is given."""
    decoded_ms, full_ms = read.cpu_ms_per_img + decode_ms, read.cpu_ms_per_img + decode_ms + augment_ms
    decoded, full = (min(read.img_s, 1000 * min(threads, CORES) / ms) for ms in (decoded_ms, full_ms))
    again = throughput(reread or read.img_s, 0.02)
    return StageThroughput(read, throughput(decoded, decoded_ms), throughput(full, full_ms), again, None, SET_BYTES)


def use(own: float, neighbours: float = 0.0, pressure: Pressure = CALM) -> CpuUse:
    """`own` cores in use by the loader's threads, and cores that neighbours use."""
    groups_s = {**dict.fromkeys(GROUPS, 0.0), "loader": own * WINDOW_S}
    return CpuUse(WINDOW_S, groups_s, 0.0, neighbours * WINDOW_S, pressure)


def windows(
    apart: StageThroughput,
    supply: float | None = None,
    demand: float = DEMAND,
    wait_ms: float | None = None,
    rest_ms: float = 0.0,
    trainer_cores: float = 0.0,
    neighbours: float = 0.0,
    slower_ms: float = 0.0,
    asynchronous: bool = False,
    pressure: Pressure = CALM,
    launch_s: float = 0.0,
) -> WindowMeasurements:
    """Windows of a trainer that waits as long as the loader's supply implies, or for `wait_ms` an image.

    Its real steps take `slower_ms` an image more than the replayed ones.
    """
    supply = apart.full.img_s if supply is None else supply
    step_s = 1 / demand
    wait_s = max(0.0, 1 / supply - step_s) if wait_ms is None else wait_ms / 1000
    step_s += slower_ms / 1000
    rounds = []
    for n in range(5):
        whole_s = (wait_s + step_s + rest_ms / 1000) * (1 + 0.001 * n)
        images = round(WINDOW_S / whole_s)
        rounds.append(
            WindowRound(demand, LoopTotals(images, images * wait_s, images * step_s, images * whole_s), supply)
        )
    steps = tuple(StepTiming(n * 0.1, 128 * wait_s, 128 * step_s, 0.128 * rest_ms) for n in range(20))
    loader = use(supply * apart.full.cpu_ms_per_img / 1000, neighbours, pressure)
    trainer = use(trainer_cores, neighbours)
    found = WindowMeasurements(tuple(rounds), steps, 0.2, loader, trainer, loader, asynchronous)
    return replace(found, launch_s=launch_s, images_of_step=BATCH)


QUICK_READ, SLOW_READ = throughput(60_000, 0.02), throughput(1000, 0.02)
HEALTHY = stages(QUICK_READ)
COLD = stages(SLOW_READ, reread=60_000)
NETWORK = StorageProbe("fuse.remote", "host:/data", True, latency_s=0.003, bytes_s=40e6, parallel_bytes_s=160e6)
SLOW_NETWORK = replace(NETWORK, parallel_bytes_s=42e6)
LIMITED_HOST = replace(HOST, machine_bytes=16 * SET_BYTES, limit_bytes=SET_BYTES, available_bytes=SET_BYTES // 2)
THROTTLED = Pressure(WINDOW_S, periods=20, throttled_periods=19, throttled_s=1.7)
SWAPPED = Pressure(WINDOW_S, swapped_in_bytes=300 * 2**20)

# name: (verdict, cause, stages, arguments of `windows`, fields of the setup, arguments of `build_findings`)
PLANTED: dict[str, tuple[str, str, StageThroughput, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "none": ("compute-bound", "none", HEALTHY, {}, {}, {}),
    "slow trainer": ("compute-bound", "none", HEALTHY, {"demand": 100.0}, {}, {}),
    "slow storage": ("input-bound: storage", "slow storage", stages(SLOW_READ, reread=1100), {}, {}, {}),
    "cold cache": ("input-bound: storage", "cold cache", stages(SLOW_READ, reread=60_000), {}, {}, {}),
    "large set": (
        "input-bound: storage",
        "slow storage",
        stages(SLOW_READ, reread=60_000),
        {},
        {"host": SMALL_HOST},
        {},
    ),
    "network folder": (
        "input-bound: storage",
        "network folder",
        replace(COLD, probe=NETWORK, image_bytes=40_000),
        {},
        {"host": SMALL_HOST},
        {},
    ),
    "network folder that fits in memory": (
        "input-bound: storage",
        "network folder",
        replace(COLD, probe=SLOW_NETWORK, image_bytes=40_000),
        {},
        {},
        {},
    ),
    "memory limit": ("input-bound: storage", "memory limit", COLD, {}, {"host": LIMITED_HOST}, {}),
    "CPU quota": (
        "contention",
        "CPU quota",
        HEALTHY,
        {"wait_ms": 0.1, "pressure": THROTTLED, "neighbours": 0.2},
        {"cores": 1.0, "affinity_cores": CORES},
        {},
    ),
    "CPU quota, loader too slow": (
        "input-bound: decode",
        "CPU quota",
        HEALTHY,
        {"supply": 950.0, "pressure": THROTTLED},
        {"cores": 1.0, "affinity_cores": CORES},
        {},
    ),
    "swap": ("contention", "swap", HEALTHY, {"wait_ms": 0.1, "pressure": SWAPPED}, {}, {}),
    "noisy neighbours with uneven waits": (
        "contention",
        "noisy neighbours",
        HEALTHY,
        {"wait_ms": 0.2, "neighbours": 2.5},
        {},
        {},
    ),
    "slow launches": (
        "compute-bound",
        "slow launches",
        HEALTHY,
        {"asynchronous": True, "launch_s": 0.95 * BATCH / DEMAND},
        {},
        {},
    ),
    "bursts": ("input-bound: storage", "bursts", stages(throughput(1000, 0.02, 0.02, 0.9)), {}, {}, {}),
    "few threads": (
        "input-bound: decode",
        "few threads",
        stages(QUICK_READ, threads=1),
        {},
        {"threads": 1},
        {},
    ),
    "large images": (
        "input-bound: decode",
        "large images",
        stages(QUICK_READ, 6.0),
        {},
        {"decode_area_ratio": 8.0},
        {},
    ),
    "few cores": ("input-bound: decode", "few cores", stages(QUICK_READ, 3.0), {}, {}, {}),
    "expensive augmentation": (
        "input-bound: augment",
        "expensive augmentation",
        stages(QUICK_READ, 0.8, 3.0),
        {},
        {},
        {},
    ),
    "noisy neighbours": (
        "input-bound: decode",
        "noisy neighbours",
        HEALTHY,
        {"supply": 1200.0, "neighbours": 2.5},
        {},
        {},
    ),
    "slow callback": ("unexplained", "slow callback", HEALTHY, {"rest_ms": 0.4}, {}, {}),
    "short queue": ("contention", "short queue", HEALTHY, {"wait_ms": 0.1}, {"queue_depth": 1}, {}),
    "slow rank": (
        "input-bound: decode",
        "slow rank",
        HEALTHY,
        {"supply": 1600.0},
        {"ranks": 2},
        {"rank_supplies": (1900.0, 800.0)},
    ),
    "slow transfer": (
        "input-bound: transfer",
        "slow transfer",
        HEALTHY,
        {"supply": 1200.0},
        {"ranks": 2},
        {"swapped": 1200.0, "rank_supplies": (1950.0, 1960.0)},
    ),
    "shared device": ("contention", "shared device", HEALTHY, {"slower_ms": 0.1, "asynchronous": True}, {}, {}),
    "shared cores": ("contention", "shared cores", HEALTHY, {"wait_ms": 0.1, "trainer_cores": 3.5}, {}, {}),
}


def found_for(name: str) -> Findings:
    _, _, apart, timing, setup, known = PLANTED[name]
    return build_findings(
        apart,
        windows(apart, **timing),
        replace(SETUP, **setup),
        **{"memory": MEMORY, "environment": {"cpu": "x"}, **known},
    )
