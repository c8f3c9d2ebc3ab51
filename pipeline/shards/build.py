"""Builds a shard set from a source's listing: plan, work, publish; and repairs a damaged one.

The plan says which image goes to which shard and position. It is a pure function of listing, settings and seed. Each
shard is one independent job, so any number of workers writes the same bytes.

Work happens in `SPLIT.unfinished` beside the final folder. Every finished shard leaves a journal entry there, so that
the same command after a crash continues where the last run stopped. The folder gets its final name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import doing, fsync_folder, remove_temporary, write_atomically
from pipeline.imagenet.listing import Listing
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.philox import epoch_order
from pipeline.shards.bottleneck import StageSeconds
from pipeline.shards.format import INDEX, ORIGINALS, Manifest, Quarantined, SkippedCount, originals_text
from pipeline.shards.job import (
    ShardJob,
    ShardResult,
    journal_path,
    read_journal_entry,
    run_job,
    write_journal_entry,
)
from pipeline.shards.reader import open_shards, read_index, rows_by_shard
from pipeline.shards.row_groups import remove_unpacked, unpacked
from pipeline.shards.settings import ShardSettings
from pipeline.shards.transcode import library_versions
from pipeline.shards.verify import verify
from pipeline.shards.work_folder import CLAIM, LOCK, difference_of, locked, read_record
from pipeline.shards.writer import mark_hashed, publish
from pipeline.workers import ProgressCallback, Workers, ignore

PLAN = "plan.json"
SOURCE_MAY_CHANGE = "may change"  # in PLAN, once too many images were undecodable: the user will replace some


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        manifest: The complete shard set.
        shards_written: Number of its shards that this run wrote; earlier runs wrote the others.
        stage_seconds: Time that the workers of this run spent.
    """

    manifest: Manifest
    shards_written: int
    stage_seconds: StageSeconds


class TooManyQuarantined(Exception):
    """More images cannot be decoded than the user allows, or none can. The text says how many and what to do.

    Attributes:
        quarantined: All of these images, sorted by key.
    """

    def __init__(self, message: str, quarantined: Sequence[Quarantined]) -> None:
        super().__init__(message)
        self.quarantined = tuple(quarantined)


def make_split(
    listing: Listing,
    root: Path,
    settings: ShardSettings,
    workers: Workers,
    max_quarantine: int,
    progress: ProgressCallback,
) -> Outcome:
    """Writes the shard set `root`/SPLIT, or finishes what an earlier run began, or finds it complete.

    Args:
        listing: The images of the split.
        root: Folder that gets a folder per split.
        settings: What decides the bytes.
        workers: What the jobs run on.
        max_quarantine: Number of images that may be undecodable.
        progress: Called with the number of images done.

    Raises:
        ValueError: `root`/SPLIT was made with other settings or from another source, or is damaged.
        TooManyQuarantined: More than `max_quarantine` images are undecodable. Nothing is published.
    """
    return SplitBuild(listing, root, settings, workers, max_quarantine, progress).make()


def repair_split(
    listing: Listing,
    root: Path,
    settings: ShardSettings,
    workers: Workers,
    max_quarantine: int,
    progress: ProgressCallback,
) -> Outcome:
    """Rebuilds what is damaged or missing of `root`/SPLIT from its source, to the same bytes.

    Keeps shards without a fault. Rebuilds all shards if the manifest or the index is damaged. After a crash, the same
    call or `make_split` finishes the repair. Takes the arguments of `make_split` and raises the same errors.
    """
    return SplitBuild(listing, root, settings, workers, max_quarantine, progress).repair()


def plan(listing: Listing, settings: ShardSettings, folder: Path) -> Iterator[ShardJob]:
    """The jobs that write `listing` into `folder`. Images are in an order drawn from the seed."""
    order = epoch_order(len(listing.items), settings.seed, epoch=0)
    size = settings.samples_per_shard(len(order))
    for number, start in enumerate(range(0, len(order), size)):
        items = listing.items.take(order[start : start + size])
        yield ShardJob(folder, f"{listing.split}-{number:06d}", items, settings.resize)


def run_jobs(jobs: Iterable[ShardJob], workers: Workers, progress: ProgressCallback) -> list[ShardResult]:
    """The results of all jobs, sorted by name. Jobs with a journal entry are not run again."""
    results: list[ShardResult] = []

    def done(result: ShardResult) -> None:
        results.append(result)
        progress(len(result.rows) + len(result.quarantined))

    def remaining() -> Iterator[ShardJob]:
        for job in jobs:
            if (finished := read_journal_entry(job)) is None:
                yield job
            else:
                done(finished)

    for result in workers.as_done(run_job, remaining()):
        done(result)
    return sorted(results, key=lambda result: result.name)


@dataclass(frozen=True)
class SplitBuild:
    """The building of one split. The fields are the arguments of `make_split`."""

    listing: Listing
    root: Path
    settings: ShardSettings
    workers: Workers
    max_quarantine: int
    progress: ProgressCallback

    @property
    def final(self) -> Path:
        """Folder of the complete shard set."""
        return self.root / self.listing.split

    @property
    def work(self) -> Path:
        """Folder of the unfinished shard set."""
        return self.root / f"{self.listing.split}.unfinished"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What decides the bytes, as the manifest records it: all settings, library versions, and the source."""
        size = self.settings.samples_per_shard(len(self.listing.items))
        numbers = {"seed": self.settings.seed, "shard_samples": size}
        settings = {**asdict(self.settings.resize), **numbers, "versions": library_versions()}
        return {"settings": settings, "source": self.listing.record()}

    def make(self) -> Outcome:
        """See `make_split`."""
        if self.final.exists():
            return self.check_finished()
        self.unusable()  # before any work
        with locked(self.work):
            (self.work / CLAIM).unlink(missing_ok=True)  # of a part that was killed while it published
            remove_temporary(self.work)
            self.begin()
            jobs = plan(self.listing, self.settings, self.work)
            with unpacked(jobs, self.work, self.workers) as (with_images, unpacking):
                results = run_jobs(with_images, self.workers, self.progress)
            return self.complete(results, unpacking)

    def complete(self, results: Sequence[ShardResult], unpacking: StageSeconds) -> Outcome:
        """Publishes the set once the results of all shards are there. The caller is the only one that does."""
        found = [*self.unusable(), *(entry for result in results for entry in result.quarantined)]
        quarantined = sorted(found, key=lambda entry: entry.key)
        self._check_quarantine(results, quarantined)
        manifest = self._publish(results, quarantined)
        with doing(f"rename to {self.final.name}", self.work):
            self.work.rename(self.final)
        self._remove_locks()
        fsync_folder(self.root)
        spent = [result.stage_seconds for result in results if result.stage_seconds is not None]
        return Outcome(manifest, len(spent), sum(spent, unpacking))

    def repair(self) -> Outcome:
        """See `repair_split`."""
        if self.final.exists():
            faults = verify(self.final, False, self.workers, ignore)
            faulty = {Path(fault.file).stem for fault in faults}
            if Path(MANIFEST).stem not in faulty:
                manifest = Manifest.from_json((self.final / MANIFEST).read_text(), self.final / MANIFEST)
                self._check_inputs(manifest, "repair it from the same source with the same options")
                if not faults:
                    self.progress(len(self.listing.items))
                    return Outcome(manifest, 0, StageSeconds())
                if Path(INDEX).stem not in faulty:
                    self._restore_journal(manifest, faulty)
            # From here on the folder is that of an interrupted run, which `make` finishes.
            with doing(f"rename to {self.work.name}", self.final):
                self.final.rename(self.work)
            (self.work / MANIFEST).unlink(missing_ok=True)
        return self.make()

    def check_finished(self) -> Outcome:
        """The outcome for a set that is complete already.

        Raises:
            ValueError: It was made with other settings or from another source, or is damaged.
        """
        if not (self.final / MANIFEST).is_file():
            raise ValueError(f"{self.final}: no {MANIFEST} in it, so not a shard set; choose another OUT, or remove it")
        self._remove_locks()  # left by a run that was killed between rename and unlink
        manifest = open_shards(self.final).manifest
        self._check_inputs(manifest, "choose another OUT, or remove this folder")
        self.progress(manifest.source["images"])
        return Outcome(manifest, 0, StageSeconds())

    def _check_inputs(self, manifest: Manifest, remedy: str) -> None:
        found = {"settings": manifest.settings, "source": manifest.source}
        if difference := difference_of(found, self.inputs):
            raise ValueError(f"{self.final}: made with other settings or source ({difference}); {remedy}")

    def _remove_locks(self) -> None:
        for name in (LOCK, CLAIM):
            (self.final / name).unlink(missing_ok=True)

    def begin(self) -> None:
        """Records in the work folder what it is for, or checks that it is for the same settings and source."""
        path = self.work / PLAN
        fsync_folder(self.work)  # warns now, once for all workers, if the file system lacks this or the next operation
        mark_hashed(self.work / LOCK)
        if not path.is_file():
            write_atomically(path, json.dumps(self.inputs, indent=1))
        found = read_record(path)
        if found.get("source") == SOURCE_MAY_CHANGE:
            found["source"] = self.inputs["source"]
            if self.settings.shard_samples is None:  # another number of images may have another default
                found["settings"]["shard_samples"] = self.inputs["settings"]["shard_samples"]
            self._remove_surplus_shards()
        if difference := difference_of(found, self.inputs):
            raise ValueError(
                f"{self.work}: begun with other settings or source ({difference});"
                " use the same source and options again, or remove the folder"
            )

    def _check_quarantine(self, results: Sequence[ShardResult], quarantined: Sequence[Quarantined]) -> None:
        """Raises if too many images are undecodable. The next run redoes only the shards with such images."""
        images = len(self.listing.items) + len(self.listing.unusable)
        if images == 0:
            raise ValueError(f"{self.listing.split}: no images in the source, expected at least 1")
        if len(quarantined) <= self.max_quarantine and len(quarantined) < images:
            return
        write_atomically(self.work / PLAN, json.dumps({**self.inputs, "source": SOURCE_MAY_CHANGE}, indent=1))
        for result in results:
            if result.quarantined:
                journal_path(self.work, result.name).unlink(missing_ok=True)
        allowed = min(self.max_quarantine, images - 1)
        advice = ", or raise --max-quarantine" if len(quarantined) < images else "; a set without samples is not made"
        fault = "cannot be decoded or have no usable label" if self.listing.unusable else "cannot be decoded"
        raise TooManyQuarantined(
            f"{self.listing.split}: {len(quarantined)} of {images} images {fault}, at most {allowed} are allowed;"
            f" replace these files in the source{advice}",
            quarantined,
        )

    def unusable(self) -> list[Quarantined]:
        """The images that are known to be unusable before any image is read. Raises if they alone are too many."""
        unusable = [Quarantined(image.key, f"{image.file.name}: {image.reason}") for image in self.listing.unusable]
        if len(unusable) > self.max_quarantine:
            images = len(self.listing.items) + len(unusable)
            raise TooManyQuarantined(
                f"{self.listing.split}: {len(unusable)} of {images} images do not exist or have no usable label,"
                f" at most {self.max_quarantine} are allowed; correct the source, or raise --max-quarantine",
                unusable,
            )
        return unusable

    def _remove_surplus_shards(self) -> None:
        """Removes shards of an earlier plan for a source with more images."""
        images = len(self.listing.items)
        shards = -(-images // self.settings.samples_per_shard(images))
        for path in self.work.glob(f"{self.listing.split}-*"):
            number = path.stem.rpartition("-")[2]
            if number.isdigit() and int(number) >= shards:
                path.unlink()

    def _publish(self, results: Sequence[ShardResult], quarantined: Sequence[Quarantined]) -> Manifest:
        """Writes index and manifest into the work folder, and removes what only the work needed."""
        index = np.concatenate([result.rows for result in results])
        index["shard"] = np.repeat(np.arange(len(results)), [len(result.rows) for result in results])
        shards, listing = tuple(result.record for result in results), self.listing
        originals = originals_text(listing.originals)

        def manifest_of(index_sha256: str) -> Manifest:
            return Manifest(
                listing.split,
                len(index),
                listing.classes,
                shards,
                index_sha256,
                **self.inputs,
                quarantined=tuple(quarantined),
                skipped=tuple(SkippedCount(skipped.reason, skipped.count) for skipped in listing.skipped),
                classes_without_images=tuple(listing.classes_without_images()),
                originals_sha256=hashlib.sha256(originals).hexdigest() if originals else None,
            )

        if originals:
            write_atomically(self.work / ORIGINALS, originals)
        manifest = publish(self.work, manifest_of, index)
        for result in results:
            journal_path(self.work, result.name).unlink()
        (self.work / PLAN).unlink()
        remove_temporary(self.work)
        remove_unpacked(self.work)
        return manifest

    def _restore_journal(self, manifest: Manifest, faulty: set[str]) -> None:
        """Writes for every shard without a fault the journal entry that its job once wrote, so that it is kept."""
        parts = rows_by_shard(read_index(self.final, manifest), manifest)
        reasons = {entry.key: entry for entry in manifest.quarantined}
        jobs = plan(self.listing, self.settings, self.final)
        for job, record, rows in zip(jobs, manifest.shards, parts, strict=True):
            if job.name in faulty:
                continue
            rows["shard"] = 0
            missing = [reasons[item.key] for item in job.items if item.key in reasons] if reasons else []
            write_journal_entry(job, ShardResult(job.name, record, rows, missing, None))
