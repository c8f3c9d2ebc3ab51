"""TODO-DOC pipeline.shards.job (from pipeline.sharder)."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.files import published
from pipeline.imagenet.listing import Items
from pipeline.imagenet.source import ItemReader
from pipeline.shards.bottleneck import StageSeconds
from pipeline.shards.format import INDEX_DTYPE, Quarantined, Sample, ShardRecord
from pipeline.shards.transcode import ResizeSettings, Undecodable, decode, encode, resize
from pipeline.shards.writer import write_shard


@dataclass(frozen=True)
class ShardJob:
    """One shard of the plan."""

    folder: Path
    name: str
    items: Items
    resize: ResizeSettings


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What a job did. `rows` has INDEX_DTYPE, `shard` left 0; `busy` is None where an earlier run did it."""

    name: str
    record: ShardRecord
    rows: np.ndarray
    quarantined: list[Quarantined]
    busy: StageSeconds | None


def write_job(job: ShardJob) -> ShardResult:
    """Writes one shard and, when it is whole, the note that says so. Runs in a worker."""
    torch.set_num_threads(1)  # a worker is one core; more threads would only take the other workers' time
    started_s = time.perf_counter()
    samples, quarantined, busy = _transcoded(job)
    record, rows = write_shard(job.folder, job.name, samples)
    result = ShardResult(job.name, record, rows, quarantined, None)
    note_shard(job.folder, result)
    write_s = time.perf_counter() - started_s - busy.total_s()
    return ShardResult(job.name, record, rows, quarantined, busy + StageSeconds(write_s=write_s))


def _transcoded(job: ShardJob) -> tuple[list[Sample], list[Quarantined], StageSeconds]:
    """The job's pictures as they are stored, in its order. They are read in the source's: disks like that, and a
    parquet row group is then read once. All of a shard's stored pictures are in memory, about 20 kB each."""
    samples: dict[int, Sample] = {}
    quarantined: dict[int, Quarantined] = {}
    spent_s = dict.fromkeys(("read", "decode", "resize", "encode"), 0.0)
    with ItemReader() as reader:
        for place in _source_order(job.items).tolist():
            item = job.items[place]
            clock = [time.perf_counter()]
            try:
                data = reader.read(item)
                clock.append(time.perf_counter())
                picture = decode(data, job.resize)
                clock.append(time.perf_counter())
                picture = resize(picture, job.resize)
                clock.append(time.perf_counter())
                stored = encode(picture, job.resize)
                samples[place] = Sample(item.key, item.label, stored.jpeg, stored.width, stored.height)
            except Undecodable as error:
                quarantined[place] = Quarantined(item.key, str(error))
            clock.append(time.perf_counter())
            for stage, start_s, end_s in zip(spent_s, clock, clock[1:], strict=False):
                spent_s[stage] += end_s - start_s
    busy = StageSeconds(**{f"{stage}_s": seconds for stage, seconds in spent_s.items()})
    return [samples[place] for place in sorted(samples)], [quarantined[p] for p in sorted(quarantined)], busy


def _source_order(items: Items) -> np.ndarray:
    order: np.ndarray = np.lexsort((items.offset, items.name, items.parent))
    return order


def note_shard(folder: Path, result: ShardResult) -> None:
    fields = {
        "record": asdict(result.record),
        "rows": result.rows.tolist(),
        "quarantined": [asdict(entry) for entry in result.quarantined],
    }
    with published(note_path(folder, result.name)) as file:
        file.write(json.dumps(fields).encode())


def note_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def read_note(job: ShardJob) -> ShardResult | None:
    """The result that a finished job noted, if its tar is there and as long as noted."""
    path = note_path(job.folder, job.name)
    if not path.is_file():
        return None
    fields = json.loads(path.read_text())
    record = ShardRecord(**fields["record"])
    tar = job.folder / record.name
    if not tar.is_file() or tar.stat().st_size != record.bytes or not tar.with_suffix(".idx").is_file():
        return None
    rows = np.array([tuple(row) for row in fields["rows"]], dtype=INDEX_DTYPE)
    return ShardResult(job.name, record, rows, [Quarantined(**q) for q in fields["quarantined"]], None)
