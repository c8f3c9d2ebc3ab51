"""One shard as one job: transcode its images, write its tar, and write a journal entry that says it is complete.

A job runs in a worker and does not depend on other jobs. The journal entry is a file `SHARD.json` in the work folder;
after an interruption, the next run takes the result from it instead of repeating the job.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from pipeline.files import published
from pipeline.imagenet.item_reader import ItemReader
from pipeline.imagenet.listing import Items
from pipeline.shards.bottleneck import StageSeconds
from pipeline.shards.format import DALI_INDEX_SUFFIX, INDEX_DTYPE, Quarantined, Sample, ShardRecord
from pipeline.shards.settings import ResizeSettings
from pipeline.shards.transcode import Undecodable, decode, encode, resize
from pipeline.shards.work_folder import read_record
from pipeline.shards.writer import write_shard


@dataclass(frozen=True)
class ShardJob:
    """One shard of the plan.

    Attributes:
        folder: Where the shard is written.
        name: File name without suffix, such as `train-000000`.
        items: The images of the shard, in the order in which they are written.
        resize: How each image is stored.
        unpacked: The same items at another place, from which they are read; None reads them from where they are.
    """

    folder: Path
    name: str
    items: Items
    resize: ResizeSettings
    unpacked: Items | None = None


@dataclass(frozen=True, eq=False)
class ShardResult:
    """The result of a job.

    Attributes:
        name: The job's name.
        record: The written tar.
        rows: Its index rows (INDEX_DTYPE) with `shard` still 0.
        quarantined: Images that could not be decoded.
        stage_seconds: Time that this run spent on the job; None if an earlier run did it.
    """

    name: str
    record: ShardRecord
    rows: np.ndarray
    quarantined: list[Quarantined]
    stage_seconds: StageSeconds | None


def run_job(job: ShardJob) -> ShardResult:
    """Writes one shard and then its journal entry. Runs in a worker."""
    import torch  # here, because the process that plans and publishes does not need it

    torch.set_num_threads(1)  # there is a worker per core; more threads would take time from the other workers
    started_s = time.perf_counter()
    samples, quarantined, spent = _transcode_items(job)
    record, rows = write_shard(job.folder, job.name, samples)
    write_journal_entry(job, ShardResult(job.name, record, rows, quarantined, None))
    write_s = time.perf_counter() - started_s - spent.total_s()
    return ShardResult(job.name, record, rows, quarantined, spent + StageSeconds(write_s=write_s))


def _transcode_items(job: ShardJob) -> tuple[list[Sample], list[Quarantined], StageSeconds]:
    """Transcodes the job's images and returns them in the job's order.

    Reads them in the source's order, which suits disks and reads each parquet row group once. Holds all stored images
    of the shard in memory, about 20 kB each.
    """
    samples: dict[int, Sample] = {}
    quarantined: dict[int, Quarantined] = {}
    spent_s = dict.fromkeys(("read", "decode", "resize", "encode"), 0.0)
    items = job.items if job.unpacked is None else job.unpacked
    with ItemReader() as reader:
        for place in _source_order(items).tolist():
            item = items[place]
            times_s = [time.perf_counter()]
            try:
                data = reader.read(item)
                times_s.append(time.perf_counter())
                pixels = decode(data, job.resize)
                times_s.append(time.perf_counter())
                pixels = resize(pixels, job.resize)
                times_s.append(time.perf_counter())
                stored = encode(pixels, job.resize)
                samples[place] = Sample(item.key, item.label, stored.jpeg, stored.width, stored.height)
            except Undecodable as error:
                quarantined[place] = Quarantined(item.key, str(error))
            times_s.append(time.perf_counter())
            for stage, start_s, end_s in zip(spent_s, times_s, times_s[1:], strict=False):
                spent_s[stage] += end_s - start_s
    spent = StageSeconds(**{f"{stage}_s": seconds for stage, seconds in spent_s.items()})
    return [samples[place] for place in sorted(samples)], [quarantined[p] for p in sorted(quarantined)], spent


def _source_order(items: Items) -> np.ndarray:
    """Positions in `items`, sorted by folder, file and offset."""
    order: np.ndarray = np.lexsort((items.offset, items.name, items.parent))
    return order


def journal_path(folder: Path, shard_name: str) -> Path:
    """Where the journal entry of the shard `shard_name` is."""
    return folder / f"{shard_name}.json"


def _fingerprint(job: ShardJob) -> str:
    """Changes with any key, label or size, like the fingerprint of a whole source, and with how images are stored."""
    columns = [column.tolist() for column in (job.items.key, job.items.label, job.items.size)]
    return sha256(repr((*columns, asdict(job.resize))).encode()).hexdigest()


def write_journal_entry(job: ShardJob, result: ShardResult) -> None:
    """Records that the job's shard is complete, with everything that publishing the set needs to know of it."""
    fields = {
        "items": _fingerprint(job),
        "record": asdict(result.record),
        "rows": result.rows.tolist(),
        "quarantined": [asdict(entry) for entry in result.quarantined],
    }
    with published(journal_path(job.folder, job.name)) as file:
        file.write(json.dumps(fields).encode())


def read_journal_entry(job: ShardJob) -> ShardResult | None:
    """The result of a job that is complete. None if it must run.

    It must run without an undamaged entry, if its images or settings changed since, or if its files are missing or of
    another size.
    """
    path = journal_path(job.folder, job.name)
    if not path.is_file():
        return None
    fields = read_record(path)
    if fields.get("items") != _fingerprint(job):
        return None
    record = ShardRecord(**fields["record"])
    tar = job.folder / record.name
    if not tar.is_file() or tar.stat().st_size != record.bytes or not tar.with_suffix(DALI_INDEX_SUFFIX).is_file():
        return None
    rows = np.array([tuple(row) for row in fields["rows"]], dtype=INDEX_DTYPE)
    return ShardResult(job.name, record, rows, [Quarantined(**q) for q in fields["quarantined"]], None)
