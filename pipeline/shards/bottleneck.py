"""What a sharding run was bound by: where its workers' time went, and what would make it faster."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class StageSeconds:
    """Seconds that workers spent, all of them together. `write_s` includes checksums and waiting for the disk."""

    read_s: float = 0.0
    decode_s: float = 0.0
    resize_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def total_s(self) -> float:
        """Seconds that were not idle."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class BoundBy:
    """Shares of the workers' time, which add up to 1, the largest part and what to do about it."""

    shares: dict[str, float]
    part: str
    advice: str

    def __str__(self) -> str:
        spent = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return f"bound by {self.part}: {spent}; {self.advice}"


def bound_by(busy: StageSeconds, wall_s: float, workers: int, cores: int, jobs: int) -> BoundBy:
    """The verdict on a run of `jobs` jobs that took `wall_s` with `workers` workers, on a machine of `cores` cores."""
    whole_s = max(workers * wall_s, busy.total_s())
    shares = {name.removesuffix("_s"): seconds / whole_s for name, seconds in asdict(busy).items()}
    shares["idle"] = 1 - busy.total_s() / whole_s
    compute = shares["decode"] + shares["resize"] + shares["encode"]
    rivals = {"idle": shares["idle"], "read": shares["read"], "write": shares["write"], "compute": compute}
    part = max(rivals, key=lambda name: rivals[name])
    if part == "compute":
        part = max(("decode", "resize", "encode"), key=lambda name: shares[name])
    return BoundBy(shares, part, _advice(part, workers, cores, jobs))


def _advice(part: str, workers: int, cores: int, jobs: int) -> str:
    match part:
        case "idle" if jobs < 4 * workers:
            return f"{jobs} shards do not fill {workers} workers: smaller --shard-samples would share the work better"
        case "idle":
            return "workers start and wait for work more than they do it: fewer --workers would do"
        case "read":
            return "the source's disk or network is too slow: copy it to a faster one, or have more --workers wait"
        case "write":
            return "the destination's disk is too slow: write to a faster one"
        case _ if workers < cores:
            return f"{workers} of {cores} cores worked: --workers {cores} would be faster"
    return f"all {cores} cores of this machine worked: more machines would be faster (--engine)"
