"""What make_shards.py prints and writes of a shard set, or of a part of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pipeline.shards.bottleneck import find_bottleneck
from pipeline.shards.build import Outcome
from pipeline.shards.format import Quarantined
from pipeline.shards.parts import Part, PartOutcome
from tools.shared.cli import cores


def report(
    outcome: Outcome | PartOutcome, part: Part | None, folder: Path, took_s: float, workers: int
) -> dict[str, object]:
    """Prints the result of a split or of a part, and the bottleneck of the run; returns both for `--json`."""
    if isinstance(outcome, PartOutcome):
        return report_part(outcome, str(part), folder, took_s, workers)
    manifest = outcome.manifest
    shards, total_bytes = len(manifest.shards), sum(shard.bytes for shard in manifest.shards)
    complete_run = outcome.shards_written == shards  # otherwise the time is not that of the whole set
    img_s = manifest.samples / took_s if complete_run else None
    how = f"{took_s:.1f} s, {img_s:,.0f} img/s ({img_s / workers:,.0f} per worker)" if img_s else "complete"
    print(f"{folder}: {manifest.samples:,} samples in {shards} shards, {total_bytes / 1e6:,.1f} MB; {how}")
    return {
        "folder": str(folder),
        "samples": manifest.samples,
        "shards": shards,
        "bytes": total_bytes,
        "img_s": img_s,
        "workers": workers,
        **report_work(outcome, manifest.quarantined, took_s, workers),
    }


def report_part(outcome: PartOutcome, part: str, folder: Path, took_s: float, workers: int) -> dict[str, object]:
    """Prints the result of a part that did not publish the set; returns it for `--json`."""
    after = f"{outcome.complete} of {outcome.shards_of_set} shards of the set are; the part that ends last publishes it"
    if outcome.complete == outcome.shards_of_set:
        after = "so are all others, and another part publishes the set; if it was killed, run this without --part"
    print(f"{folder}: part {part} with {outcome.shards} shards is complete; {after}")
    return {
        "folder": str(folder),
        "part": part,
        "part_shards": outcome.shards,
        "shards": outcome.shards_of_set,
        "complete": outcome.complete,
        "workers": workers,
        **report_work(outcome, outcome.quarantined, took_s, workers),
    }


def report_work(
    outcome: Outcome | PartOutcome, quarantined: Iterable[Quarantined], took_s: float, workers: int
) -> dict[str, object]:
    """Prints the bottleneck of the run, if it wrote a shard, and the quarantined images; returns both for `--json`."""
    bottleneck = None
    if outcome.shards_written:
        bottleneck = find_bottleneck(outcome.stage_seconds, took_s, workers, cores(), outcome.shards_written)
        print(f"  {bottleneck}")
    reasons = {entry.key: entry.reason for entry in quarantined}
    for key, reason in reasons.items():
        print(f"  quarantined {key}: {reason}")
    return {"bottleneck": asdict(bottleneck) if bottleneck else None, "quarantined": reasons}
