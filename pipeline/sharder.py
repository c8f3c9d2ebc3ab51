"""From a source's listing to a published shard set: plan, work, publish.

The plan (which picture goes to which shard, at which place) is a pure function of listing, settings and seed. A shard
is one job, independent of the others, so any number of workers writes the same bytes. Work happens in `NAME.unfinished`
beside the final folder: every finished shard leaves a note there, so that the same command after a crash goes on where
it stopped; the folder gets its final name when all is whole.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.order import epoch_order
from pipeline.resize import ResizeSettings, Undecodable, library_versions, transcode
from pipeline.shards import (
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    Quarantined,
    Sample,
    ShardRecord,
    open_shards,
    publish,
    published,
    read_index,
    rows_by_shard,
    write_shard,
)
from pipeline.sources import Item, ItemReader, Listing
from pipeline.verify import verify
from pipeline.workers import executor_of, ignore

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
class ShardJob:
    """One shard of the plan."""

    folder: Path
    name: str
    items: tuple[Item, ...]
    resize: ResizeSettings


@dataclass(frozen=True)
class ShardResult:
    """What a job did. `rows` are index rows (INDEX_DTYPE fields), `shard` left 0."""

    record: ShardRecord
    rows: list[list[int]]
    quarantined: list[Quarantined]


class OverQuarantine(Exception):
    """More pictures could not be decoded than the user allows; the text says how many and what to do."""


def plan(listing: Listing, settings: ShardSettings, folder: Path) -> list[ShardJob]:
    """The jobs that write `listing` into `folder`, in an order drawn from the seed."""
    order = epoch_order(len(listing.items), settings.seed, epoch=0)
    groups = np.split(order, range(settings.shard_samples, len(order), settings.shard_samples))
    return [
        ShardJob(folder, f"{listing.split}-{number:06d}", tuple(listing.items[i] for i in group), settings.resize)
        for number, group in enumerate(groups)
    ]


def make_split(
    listing: Listing,
    out: Path,
    settings: ShardSettings,
    workers: int,
    quarantine_limit: int,
    progress: Callable[[int], None],
) -> Manifest:
    """Writes `out`/SPLIT, or finishes what an earlier run began, or finds it whole. `progress` counts pictures.

    Raises ValueError where `out`/SPLIT was made otherwise or is damaged, OverQuarantine above `quarantine_limit`.
    """
    final, work = out / listing.split, out / f"{listing.split}.unfinished"
    wanted = {"settings": settings.record(), "source": listing.record()}
    if final.exists():
        return _check_same(final, wanted, progress)
    with _locked(work):
        _begin(work, wanted)
        jobs = plan(listing, settings, work)
        with executor_of(workers, __name__) as executor:
            results = run_jobs(jobs, executor, progress)
        quarantined = sorted((q for r in results for q in r.quarantined), key=lambda q: q.key)
        if len(quarantined) > quarantine_limit:
            first = f"{quarantined[0].key}: {quarantined[0].reason}"
            raise OverQuarantine(
                f"{listing.split}: {len(quarantined)} of {len(listing.items)} images cannot be decoded, at most"
                f" {quarantine_limit} are allowed (first: {first}); mend the source or raise --max-quarantine"
            )
        manifest = _publish(work, listing, wanted, results, quarantined)
        work.rename(final)
        (final / LOCK).unlink()
    return manifest


def repair_split(
    listing: Listing,
    out: Path,
    settings: ShardSettings,
    workers: int,
    quarantine_limit: int,
    progress: Callable[[int], None],
) -> Manifest:
    """Rebuilds what is damaged or missing of `out`/SPLIT from its source, byte for byte as it was.

    Shards without a fault are taken over; all are rebuilt where manifest or index are gone. From then on the work is
    that of an interrupted run, which `make_split` finishes, and so is this after a crash. Raises as `make_split`.
    """
    final, work = out / listing.split, out / f"{listing.split}.unfinished"
    if final.exists():
        wanted = {"settings": settings.record(), "source": listing.record()}
        with executor_of(workers, __name__) as executor:
            faults = verify(final, False, executor, ignore)
        faulty = {Path(fault.file).stem for fault in faults}
        if Path(MANIFEST).stem not in faulty:
            manifest = Manifest.from_json((final / MANIFEST).read_text(), final / MANIFEST)
            if difference := _difference({"settings": manifest.settings, "source": manifest.source}, wanted):
                raise ValueError(f"{final}: made otherwise ({difference}); repair it with the same source and settings")
            if not faults:
                progress(len(listing.items))
                return manifest
            if Path(INDEX).stem not in faulty:
                _note_sound_shards(final, manifest, plan(listing, settings, final), faulty)
        final.rename(work)
        (work / MANIFEST).unlink(missing_ok=True)
    return make_split(listing, out, settings, workers, quarantine_limit, progress)


def _note_sound_shards(folder: Path, manifest: Manifest, jobs: Sequence[ShardJob], faulty: set[str]) -> None:
    """Leaves beside every shard without a fault the note that the job which wrote it left."""
    parts = rows_by_shard(read_index(folder, manifest), manifest)
    reasons = {entry.key: entry for entry in manifest.quarantined}
    for job, record, rows in zip(jobs, manifest.shards, parts, strict=True):
        if job.name in faulty:
            continue
        rows["shard"] = 0
        missing = [reasons[item.key] for item in job.items if item.key in reasons]
        _note(job, ShardResult(record, [list(row) for row in rows.tolist()], missing))


def run_jobs(jobs: Sequence[ShardJob], executor: Executor | None, progress: Callable[[int], None]) -> list[ShardResult]:
    """Results of all jobs, in plan order: those already noted in the folder, the rest by `executor` (None: in here)."""
    results: dict[str, ShardResult] = {}
    for job in jobs:
        if (noted := _read_note(job)) is not None:
            results[job.name] = noted
            progress(len(job.items))
    todo = [job for job in jobs if job.name not in results]
    if executor is None:
        for job in todo:
            results[job.name] = write_job(job)
            progress(len(job.items))
    else:
        _run_elsewhere(todo, executor, results, progress)
    return [results[job.name] for job in jobs]


def _run_elsewhere(
    jobs: Sequence[ShardJob], executor: Executor, results: dict[str, ShardResult], progress: Callable[[int], None]
) -> None:
    futures = {executor.submit(write_job, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            job = futures[future]
            results[job.name] = future.result()
            progress(len(job.items))
    except BrokenProcessPool as error:
        raise OSError("a worker process died (out of memory?); run the same command again to go on") from error
    finally:
        for future in futures:
            future.cancel()


def write_job(job: ShardJob) -> ShardResult:
    """Writes one shard and, when it is whole, the note that says so. Runs in a worker process."""
    torch.set_num_threads(1)  # a worker is one core; more threads would only take the other workers' time
    quarantined: list[Quarantined] = []
    record, rows = write_shard(job.folder, job.name, _samples(job, quarantined))
    result = ShardResult(record, [list(row) for row in rows.tolist()], quarantined)
    _note(job, result)
    return result


def _note(job: ShardJob, result: ShardResult) -> None:
    with published(_note_path(job)) as file:
        file.write(json.dumps(asdict(result)).encode())


def _samples(job: ShardJob, quarantined: list[Quarantined]) -> Iterator[Sample]:
    with ItemReader() as reader:
        for item in job.items:
            try:
                encoded = transcode(reader.read(item), job.resize)
            except Undecodable as error:
                quarantined.append(Quarantined(item.key, str(error)))
            else:
                yield Sample(item.key, item.label, encoded.jpeg, encoded.width, encoded.height)


def _note_path(job: ShardJob) -> Path:
    return job.folder / f"{job.name}.json"


def _read_note(job: ShardJob) -> ShardResult | None:
    """The result that a finished job noted, if its tar is there and as long as noted."""
    path = _note_path(job)
    if not path.is_file():
        return None
    fields = json.loads(path.read_text())
    record = ShardRecord(**fields["record"])
    tar = job.folder / record.name
    if not tar.is_file() or tar.stat().st_size != record.bytes or not tar.with_suffix(".idx").is_file():
        return None
    return ShardResult(record, fields["rows"], [Quarantined(**q) for q in fields["quarantined"]])


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
    if not path.is_file():
        with published(path) as file:
            file.write(json.dumps(wanted, indent=1).encode())
        return
    if difference := _difference(json.loads(path.read_text()), wanted):
        raise ValueError(f"{work}: begun otherwise ({difference}); use the same again, or remove the folder")


def _check_same(final: Path, wanted: dict[str, Any], progress: Callable[[int], None]) -> Manifest:
    manifest = open_shards(final).manifest
    if difference := _difference({"settings": manifest.settings, "source": manifest.source}, wanted):
        raise ValueError(f"{final}: made otherwise ({difference}); choose another folder, or remove this one")
    progress(manifest.source["images"])
    return manifest


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
    rows = [(shard, *row[1:]) for shard, result in enumerate(results) for row in result.rows]
    index = np.array(rows, dtype=INDEX_DTYPE)
    shards = tuple(result.record for result in results)
    manifest = publish(
        work,
        lambda index_sha256: Manifest(
            listing.split, len(index), listing.classes, shards, index_sha256, **wanted, quarantined=tuple(quarantined)
        ),
        index,
    )
    for result in results:
        (work / result.record.name).with_suffix(".json").unlink()
    (work / PLAN).unlink()
    return manifest
