"""The bottleneck of a sharding run: where the workers' time went, and what would make the run faster."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

MIN_JOBS_PER_WORKER = 4  # with fewer, workers that finish early are idle for a large share of the run


@dataclass(frozen=True)
class StageSeconds:
    """Seconds that workers spent in each stage, summed over workers.

    `write_s` includes checksums and disk waits. `row_groups_s` is the time of unpacking parquet row groups, if any.
    """

    read_s: float = 0.0
    decode_s: float = 0.0
    resize_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    row_groups_s: float = 0.0

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def total_s(self) -> float:
        """Seconds in all stages, which is the time that workers were not idle."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class Bottleneck:
    """What limited a run.

    Attributes:
        shares: Share of the workers' time per stage, and `idle`. They add up to 1.
        part: `idle` or the stage that limited the run.
        advice: What to change.
    """

    shares: dict[str, float]
    part: str
    advice: str

    def __str__(self) -> str:
        spent = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return f"bound by {self.part}: {spent}; {self.advice}"


def find_bottleneck(spent: StageSeconds, wall_s: float, workers: int, cores: int, jobs: int) -> Bottleneck:
    """Finds what limited a run.

    Args:
        spent: Time that the workers spent in each stage.
        wall_s: Duration of the run.
        workers: Number of workers.
        cores: Number of cores of this machine.
        jobs: Number of shards written.
    """
    capacity_s = max(workers * wall_s, spent.total_s())
    seconds_of = {name: s for name, s in asdict(spent).items() if s or name != "row_groups_s"}
    shares = {name.removesuffix("_s").replace("_", " "): s / capacity_s for name, s in seconds_of.items()}
    shares["idle"] = 1 - spent.total_s() / capacity_s
    compute = shares["decode"] + shares["resize"] + shares["encode"]
    # Decode, resize and encode compete for the same cores, so they count as one candidate against disk and idle time.
    candidates = {"idle": shares["idle"], "read": shares["read"], "write": shares["write"], "compute": compute}
    if "row groups" in shares:
        candidates["row groups"] = shares["row groups"]
    part = max(candidates, key=lambda name: candidates[name])
    if part == "compute":
        part = max(("decode", "resize", "encode"), key=lambda name: shares[name])
    return Bottleneck(shares, part, _advice(part, workers, cores, jobs))


def _advice(part: str, workers: int, cores: int, jobs: int) -> str:
    match part:
        case "idle" if jobs < MIN_JOBS_PER_WORKER * workers:
            shards = "1 shard is" if jobs == 1 else f"{jobs} shards are"
            return f"{shards} too few to keep {workers} workers busy: use a smaller --shard-samples"
        case "idle":
            return "workers mostly start up and wait for work: use fewer --workers"
        case "read":
            return "the source's disk or network is too slow: copy the source to a faster disk, or use more --workers"
        case "row groups":
            return "each parquet row group was read once and unpacked into OUT: use a faster disk for SOURCE and OUT"
        case "write":
            return "the destination's disk is too slow: write to a faster disk"
        case _ if workers < cores:
            return f"{workers} of {cores} cores were used: --workers {cores} would be faster"
    return f"all {cores} cores of this machine were used: use more machines (--engine)"
