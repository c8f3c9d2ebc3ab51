"""One part of the work on a shard set: every N-th shard of the plan. The part that ends last publishes the set.

Parts run in any order, also at the same time on machines that share the file system, and need no connection. All they
have in common is the work folder: the recorded settings and source, and a journal entry for each complete shard. So a
part that was stopped is repeated, parts of other N may follow, and a run without parts finishes what parts have left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.imagenet.listing import Listing
from pipeline.imagenet.webdataset import MANIFEST
from pipeline.shards.bottleneck import StageSeconds
from pipeline.shards.build import Outcome, SplitBuild, plan, run_jobs
from pipeline.shards.format import Quarantined
from pipeline.shards.job import ShardResult, journal_path, read_journal_entry
from pipeline.shards.row_groups import unpacked
from pipeline.shards.settings import ShardSettings
from pipeline.shards.work_folder import CLAIM, LOCK, publishing, shared
from pipeline.workers import ProgressCallback, Workers


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `of` parts: shards number - 1, number - 1 + of, ..."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that `I/N` names.

        Raises:
            ValueError: It is not of this form, or I is not one of 1 to N.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--part {text}, expected I/N with I from 1 to N, such as 1/4")
        return cls(int(found[1]), int(found[2]))

    def shards(self, of_set: int) -> range:
        """The numbers of this part's shards in a set of `of_set` shards."""
        return range(self.number - 1, of_set, self.of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class PartOutcome:
    """What a part did that did not publish the set.

    Attributes:
        shards: Number of shards of this part, all complete now.
        shards_written: Number of these that this run wrote.
        shards_of_set: Number of shards of the whole set.
        complete: Number of these that are complete; if all are, another process publishes the set.
        quarantined: Images of this part that cannot be decoded. The part that publishes compares all with the limit.
        stage_seconds: Time that the workers of this run spent.
    """

    shards: int
    shards_written: int
    shards_of_set: int
    complete: int
    quarantined: tuple[Quarantined, ...]
    stage_seconds: StageSeconds


def make_part(
    listing: Listing,
    root: Path,
    settings: ShardSettings,
    workers: Workers,
    max_quarantine: int,
    progress: ProgressCallback,
    part: Part,
) -> Outcome | PartOutcome:
    """Writes the shards of a part, and publishes `root`/SPLIT if they were the last ones.

    Takes the arguments of `make_split` and raises the same errors; ValueError also if a run without parts is writing.

    Returns:
        An `Outcome` if the set is published now; otherwise a `PartOutcome`.
    """
    build = SplitBuild(listing, root, settings, workers, max_quarantine, progress)
    if build.final.exists():
        return build.check_finished()
    build.unusable()  # before any work
    _clear_abandoned(build)
    with shared(build.work) as open_to_parts:
        if build.final.exists():  # published just now
            _remove_empty(build.work)
            return build.check_finished()
        if _is_being_published(build):
            return PartOutcome(len(part.shards(_shards(build))), 0, _shards(build), _shards(build), (), StageSeconds())
        if not open_to_parts:
            raise ValueError(f"{build.work}: a run without --part is writing here; wait for it, it makes all shards")
        results, unpacking = _run(build, part)
    published = _publish(build, results, unpacking)
    if isinstance(published, Outcome):
        return published
    spent = [result.stage_seconds for result in results if result.stage_seconds is not None]
    found = tuple(entry for result in results for entry in result.quarantined)
    return PartOutcome(len(results), len(spent), _shards(build), published, found, sum(spent, unpacking))


def part_images(listing: Listing, settings: ShardSettings, part: Part) -> int:
    """Number of images of a part."""
    images = len(listing.items)
    size = settings.samples_per_shard(images)
    return sum(min(size, images - shard * size) for shard in part.shards(-(-images // size)))


def _run(build: SplitBuild, part: Part) -> tuple[list[ShardResult], StageSeconds]:
    """The results of the part's shards, and the time of unpacking."""
    build.begin()
    numbers = part.shards(_shards(build))
    jobs = (job for n, job in enumerate(plan(build.listing, build.settings, build.work)) if n in numbers)
    with unpacked(jobs, build.work, build.workers, f"-{part.number}-of-{part.of}") as (with_images, unpacking):
        return run_jobs(with_images, build.workers, build.progress), unpacking


def _publish(build: SplitBuild, results: Sequence[ShardResult], unpacking: StageSeconds) -> Outcome | int:
    """Publishes the set if all shards are complete and no other process does it; otherwise returns how many are.

    Every part asks after it has ended its work, so the last one finds all shards complete and no part at work.
    """
    if (complete := _complete(build)) < _shards(build) and not build.final.exists():
        return _shards(build) if _is_being_published(build) else complete
    with publishing(build.work) as chosen:
        if build.final.exists():
            _remove_empty(build.work)
            return build.check_finished()
        if not chosen:
            return _shards(build)
        own = {result.name: result for result in results}
        jobs = plan(build.listing, build.settings, build.work)
        every = [own.get(job.name) or read_journal_entry(job) for job in jobs]
        whole = [result for result in every if result is not None]
        return build.complete(whole, unpacking) if len(whole) == len(every) else len(whole)


def _shards(build: SplitBuild) -> int:
    """Number of shards of the set."""
    images = len(build.listing.items)
    return -(-images // build.settings.samples_per_shard(images))


def _complete(build: SplitBuild) -> int:
    """Number of shards with a journal entry."""
    names = (f"{build.listing.split}-{number:06d}" for number in range(_shards(build)))
    return sum(journal_path(build.work, name).is_file() for name in names)


def _is_being_published(build: SplitBuild) -> bool:
    """Whether another process publishes the set, or was killed while it did. Journal entries may be gone already."""
    return any((build.work / name).exists() for name in (CLAIM, MANIFEST))


def _clear_abandoned(build: SplitBuild) -> None:
    """Removes the manifest and the claim of a process that was killed while it published, if the lock shows that."""
    if _is_being_published(build):
        with publishing(build.work) as chosen:
            if chosen and not build.final.exists():
                (build.work / MANIFEST).unlink(missing_ok=True)


def _remove_empty(work: Path) -> None:
    """Removes a work folder that this part made just after the set was published."""
    with suppress(OSError):
        (work / LOCK).unlink()
        work.rmdir()
