"""From a source's listing to a published shard set: plan, work, publish.

The plan (which picture goes to which shard, at which place) is a pure function of listing, settings and seed. A shard
is one job, independent of the others, so any number of workers writes the same bytes. Work happens in `NAME.unfinished`
beside the final folder: every finished shard leaves a note there, so that the same command after a crash goes on where
it stopped; the folder gets its final name when all is whole.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import fsync_folder, published, remove_temporary
from pipeline.imagenet.listing import Listing
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.philox import epoch_order
from pipeline.shards.bottleneck import StageSeconds
from pipeline.shards.format import INDEX, Manifest, Quarantined
from pipeline.shards.job import ShardJob, ShardResult, note_path, note_shard, read_note, write_job
from pipeline.shards.reader import open_shards, read_index, rows_by_shard
from pipeline.shards.transcode import ResizeSettings, library_versions
from pipeline.shards.verify import verify
from pipeline.shards.writer import publish
from pipeline.workers import Workers, ignore

PLAN = "plan.json"
LOCK = "lock"


@dataclass(frozen=True)
class ShardSettings:
    """What decides the bytes of a shard set, beside its source."""

    resize: ResizeSettings = field(default_factory=ResizeSettings)
    seed: int = 2012
    shard_samples: int = 1024  # the 2012 files held 1024 pictures each (convdata_jpeg.py)

    def __post_init__(self) -> None:
        if self.shard_samples < 1:
            raise ValueError(f"{self.shard_samples} samples a shard, expected at least 1")

    def record(self) -> dict[str, Any]:
        """For the manifest: every setting and the version of every library that decides bytes."""
        rest = {"seed": self.seed, "shard_samples": self.shard_samples}
        return {**asdict(self.resize), **rest, "versions": library_versions()}


@dataclass(frozen=True)
class Outcome:
    """A whole shard set, how many shards this run wrote of it, and its workers' seconds at that."""

    manifest: Manifest
    written: int
    busy: StageSeconds


class TooManyQuarantined(Exception):
    """More pictures could not be decoded than the user allows; the text says how many and what to do."""


def plan(listing: Listing, settings: ShardSettings, folder: Path) -> Iterator[ShardJob]:
    """The jobs that write `listing` into `folder`, in an order drawn from the seed."""
    order = epoch_order(len(listing.items), settings.seed, epoch=0)
    for number, start in enumerate(range(0, len(order), settings.shard_samples)):
        items = listing.items.take(order[start : start + settings.shard_samples])
        yield ShardJob(folder, f"{listing.split}-{number:06d}", items, settings.resize)


def make_split(
    listing: Listing,
    out: Path,
    settings: ShardSettings,
    workers: Workers,
    quarantine_limit: int,
    progress: Callable[[int], None],
) -> Outcome:
    """Writes `out`/SPLIT, or finishes what an earlier run began, or finds it whole. `progress` counts pictures.

    Raises ValueError where `out`/SPLIT was made otherwise or is damaged, TooManyQuarantined above `quarantine_limit`.
    """
    final, work = out / listing.split, out / f"{listing.split}.unfinished"
    wanted = {"settings": settings.record(), "source": listing.record()}
    if final.exists():
        return _check_same(final, wanted, progress)
    with _locked(work):
        _begin(work, wanted)
        results = run_jobs(plan(listing, settings, work), workers, progress)
        quarantined = sorted((q for r in results for q in r.quarantined), key=lambda q: q.key)
        if len(quarantined) > quarantine_limit:
            first = f"{quarantined[0].key}: {quarantined[0].reason}"
            raise TooManyQuarantined(
                f"{listing.split}: {len(quarantined)} of {len(listing.items)} images cannot be decoded, at most"
                f" {quarantine_limit} are allowed (first: {first}); mend the source or raise --max-quarantine"
            )
        manifest = _publish(work, listing, wanted, results, quarantined)
        work.rename(final)
        (final / LOCK).unlink()
        fsync_folder(out)
    busy = [result.busy for result in results if result.busy is not None]
    return Outcome(manifest, len(busy), sum(busy, StageSeconds()))


def repair_split(
    listing: Listing,
    out: Path,
    settings: ShardSettings,
    workers: Workers,
    quarantine_limit: int,
    progress: Callable[[int], None],
) -> Outcome:
    """Rebuilds what is damaged or missing of `out`/SPLIT from its source, byte for byte as it was.

    Shards without a fault are taken over; all are rebuilt where manifest or index are gone. From then on the work is
    that of an interrupted run, which `make_split` finishes, and so is this after a crash. Raises as `make_split`.
    """
    final, work = out / listing.split, out / f"{listing.split}.unfinished"
    if final.exists():
        wanted = {"settings": settings.record(), "source": listing.record()}
        faults = verify(final, False, workers, ignore)
        faulty = {Path(fault.file).stem for fault in faults}
        if Path(MANIFEST).stem not in faulty:
            manifest = Manifest.from_json((final / MANIFEST).read_text(), final / MANIFEST)
            if difference := _difference({"settings": manifest.settings, "source": manifest.source}, wanted):
                raise ValueError(f"{final}: made otherwise ({difference}); repair it with the same source and settings")
            if not faults:
                progress(len(listing.items))
                return Outcome(manifest, 0, StageSeconds())
            if Path(INDEX).stem not in faulty:
                _note_sound_shards(final, manifest, plan(listing, settings, final), faulty)
        final.rename(work)
        (work / MANIFEST).unlink(missing_ok=True)
    return make_split(listing, out, settings, workers, quarantine_limit, progress)


def _note_sound_shards(folder: Path, manifest: Manifest, jobs: Iterable[ShardJob], faulty: set[str]) -> None:
    """Leaves beside every shard without a fault the note that the job which wrote it left."""
    parts = rows_by_shard(read_index(folder, manifest), manifest)
    reasons = {entry.key: entry for entry in manifest.quarantined}
    for job, record, rows in zip(jobs, manifest.shards, parts, strict=True):
        if job.name in faulty:
            continue
        rows["shard"] = 0
        missing = [reasons[item.key] for item in job.items if item.key in reasons] if reasons else []
        note_shard(folder, ShardResult(job.name, record, rows, missing, None))


def run_jobs(jobs: Iterable[ShardJob], workers: Workers, progress: Callable[[int], None]) -> list[ShardResult]:
    """Results of all jobs, by name: those already noted in their folder, the rest by `workers`."""
    results: list[ShardResult] = []

    def done(result: ShardResult) -> None:
        results.append(result)
        progress(len(result.rows) + len(result.quarantined))

    def todo() -> Iterator[ShardJob]:
        for job in jobs:
            if (noted := read_note(job)) is None:
                yield job
            else:
                done(noted)

    for result in workers.as_done(write_job, todo()):
        done(result)
    return sorted(results, key=lambda result: result.name)


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Makes the work folder and holds it for this run alone."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{work}: another run is writing here; wait for it or choose another folder") from error
        yield


def _begin(work: Path, wanted: dict[str, Any]) -> None:
    """Notes what the work folder is for, or checks that it is for the same."""
    path = work / PLAN
    remove_temporary(work)
    if not path.is_file():
        with published(path) as file:
            file.write(json.dumps(wanted, indent=1).encode())
        return
    if difference := _difference(json.loads(path.read_text()), wanted):
        raise ValueError(f"{work}: begun otherwise ({difference}); use the same again, or remove the folder")


def _check_same(final: Path, wanted: dict[str, Any], progress: Callable[[int], None]) -> Outcome:
    (final / LOCK).unlink(missing_ok=True)  # of a run that was killed when all but this was done
    manifest = open_shards(final).manifest
    if difference := _difference({"settings": manifest.settings, "source": manifest.source}, wanted):
        raise ValueError(f"{final}: made otherwise ({difference}); choose another folder, or remove this one")
    progress(manifest.source["images"])
    return Outcome(manifest, 0, StageSeconds())


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The settings that differ, as `quality 90, now 85`; empty when equal."""
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        return "its record is damaged"
    parts = []
    for key, value in wanted.items():
        if isinstance(value, dict):
            parts.append(_difference(found[key], value))
        elif found[key] != value:
            parts.append(f"{key} {found[key]}, now {value}")
    return ", ".join(filter(None, parts))


def _publish(
    work: Path,
    listing: Listing,
    wanted: dict[str, Any],
    results: Sequence[ShardResult],
    quarantined: Sequence[Quarantined],
) -> Manifest:
    index = np.concatenate([result.rows for result in results])
    index["shard"] = np.repeat(np.arange(len(results)), [len(result.rows) for result in results])
    shards = tuple(result.record for result in results)
    manifest = publish(
        work,
        lambda index_sha256: Manifest(
            listing.split, len(index), listing.classes, shards, index_sha256, **wanted, quarantined=tuple(quarantined)
        ),
        index,
    )
    for result in results:
        note_path(work, result.name).unlink()
    (work / PLAN).unlink()
    remove_temporary(work)
    return manifest
