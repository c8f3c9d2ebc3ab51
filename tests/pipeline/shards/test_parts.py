"""Parts of a sharding run: in any order, several at once, killed and repeated, they give the bytes of one run."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline import files
from pipeline.imagenet.listing import Listing
from pipeline.imagenet.source import open_source
from pipeline.shards import build, parts
from pipeline.shards.build import Outcome, TooManyQuarantined, make_split
from pipeline.shards.job import ShardJob, run_job
from pipeline.shards.parts import Part, PartOutcome, make_part, part_images
from pipeline.shards.settings import ResizeSettings, ShardSettings
from pipeline.shards.verify import verify
from pipeline.shards.work_folder import CLAIM, LOCK, locked, publishing, shared
from pipeline.workers import IN_PROCESS, ignore, start_fork_server
from tests.pipeline.shards.test_quarantine_limit import source_of as twelve_images
from tests.pipeline.shards.test_row_groups import source_of as parquet_source
from tests.support import part_jobs
from tests.support.shard_fixtures import files_of
from tools.make_shards import main

SETTINGS = ShardSettings(ResizeSettings(short_side=64), seed=7, shard_samples=6)  # 8 shards of the sample's 48 images
SHARDS = 8


@pytest.fixture(scope="module")
def listing(sample: Path) -> Listing:
    return open_source(sample).listing("train")


@pytest.fixture(scope="module")
def expected(listing: Listing, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one run."""
    out = tmp_path_factory.mktemp("whole")
    make_split(listing, out, SETTINGS, IN_PROCESS, 10, ignore)
    return files_of(out)


def part(listing: Listing, out: Path, text: str, settings: ShardSettings = SETTINGS, limit: int = 10):
    return make_part(listing, out, settings, IN_PROCESS, limit, ignore, Part.parse(text))


# ---- processes ----------------------------------------------------------------------------------------------------


def start_part(source: Path, out: Path, text: str, killed_after: int | None = None):
    start_fork_server(part_jobs.__name__)
    process = get_context("forkserver").Process(
        target=part_jobs.run_part, args=(source, out, SETTINGS, text, killed_after)
    )
    process.start()
    return process


def ended(*processes) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_parts_in_odd_order_two_at_once_one_killed_give_the_bytes_of_one_run(sample: Path, tmp_path: Path, expected):
    killed = start_part(sample, tmp_path, "3/3", 6)
    assert ended(killed) == [-signal.SIGKILL]
    assert ended(start_part(sample, tmp_path, "2/3"), start_part(sample, tmp_path, "1/3")) == [0, 0]
    assert not (tmp_path / "train").exists()
    assert ended(start_part(sample, tmp_path, "3/3")) == [0]
    assert files_of(tmp_path) == expected


@pytest.mark.slow
def test_more_parts_than_shards_all_at_once_publish_once(sample: Path, tmp_path: Path, expected):
    """Some parts have no shard and end while others begin or publish."""
    processes = [start_part(sample, tmp_path, f"{n}/10") for n in range(10, 0, -1)]
    assert ended(*processes) == [0] * 10
    assert files_of(tmp_path) == expected


# ---- shares -------------------------------------------------------------------------------------------------------


def test_the_parts_of_any_number_share_the_shards_and_images(listing: Listing):
    for of in (1, 2, 3, 7, 8, 20):
        shares = [Part(number, of) for number in range(1, of + 1)]
        assert sorted(shard for share in shares for shard in share.shards(SHARDS)) == list(range(SHARDS))
        assert sum(part_images(listing, SETTINGS, share) for share in shares) == 48


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "2", "a/b", "-1/3", "1/3/5", "1.5/3", ""])
def test_a_wrong_part_is_refused_in_one_line(text: str):
    with pytest.raises(ValueError, match=f"--part {text}, expected I/N with I from 1 to N, such as 1/4"):
        Part.parse(text)


# ---- one after another --------------------------------------------------------------------------------------------


def test_parts_of_different_numbers_and_a_final_call_without_parts(listing: Listing, tmp_path: Path, expected):
    """The run without parts makes the shards that no part has made."""
    first = part(listing, tmp_path, "2/2")
    assert isinstance(first, PartOutcome)
    assert (first.shards, first.shards_written, first.complete, first.shards_of_set) == (4, 4, 4, SHARDS)
    assert part(listing, tmp_path, "2/2").shards_written == 0  # type: ignore[union-attr]
    assert part(listing, tmp_path, "2/3").complete == 5  # type: ignore[union-attr]
    assert make_split(listing, tmp_path, SETTINGS, IN_PROCESS, 10, ignore).shards_written == 3
    assert files_of(tmp_path) == expected
    assert isinstance(part(listing, tmp_path, "1/2"), Outcome)  # finds the set complete
    assert files_of(tmp_path) == expected


def test_parts_with_other_settings_are_refused(listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the recorded plan. If two first parts record theirs at the same moment, the shards of the other are redone."""
    part(listing, tmp_path, "1/2")
    other = ShardSettings(ResizeSettings(short_side=64, quality=50), 7, 6)
    with pytest.raises(ValueError, match=r"begun with other settings or source \(quality 90, now 50\)"):
        part(listing, tmp_path, "2/2", other)
    (tmp_path / "train.unfinished" / build.PLAN).unlink()
    assert part(listing, tmp_path, "1/2", other).shards_written == 4  # type: ignore[union-attr]


def test_parts_and_a_run_without_parts_refuse_one_another(listing: Listing, tmp_path: Path):
    work = tmp_path / "train.unfinished"
    with locked(work), pytest.raises(ValueError, match="a run without --part is writing here; wait for it"):
        part(listing, tmp_path, "1/2")
    with shared(work), pytest.raises(ValueError, match="another run is writing here"):
        make_split(listing, tmp_path, SETTINGS, IN_PROCESS, 10, ignore)


def test_the_last_part_names_all_images_over_the_limit_and_repaired_ones_are_redone(tmp_path: Path):
    settings, out = ShardSettings(shard_samples=4), tmp_path / "out"

    def run(text: str) -> Outcome | PartOutcome:
        return part(open_source(tmp_path / "in").listing("train"), out, text, settings, 1)

    twelve_images(tmp_path / "in", bad=2)
    quarantined = [entry for n in (1, 2) for entry in run(f"{n}/3").quarantined]  # type: ignore[union-attr]
    with pytest.raises(TooManyQuarantined, match="2 of 12 images") as caught:
        run("3/3")
    assert len(caught.value.quarantined) == 2 and set(quarantined) <= set(caught.value.quarantined)
    assert not (out / "train").exists() and not (out / "train.unfinished" / CLAIM).exists()
    twelve_images(tmp_path / "in", bad=0)
    outcomes = [run(f"{n}/3") for n in (3, 1, 2)]
    assert any(isinstance(outcome, Outcome) for outcome in outcomes)
    fresh = make_split(open_source(tmp_path / "in").listing("train"), tmp_path / "2", settings, IN_PROCESS, 1, ignore)
    assert fresh.manifest.samples == 12 and files_of(out) == files_of(tmp_path / "2")


def test_parts_of_parquet_unpack_into_folders_of_their_own(tmp_path: Path):
    settings = ShardSettings(ResizeSettings(short_side=32), shard_samples=4)
    listing = open_source(parquet_source(tmp_path / "in", 3)).listing("train")
    part(listing, tmp_path / "out", "2/2", settings)
    folders = [path.name for path in (tmp_path / "out/train.unfinished").iterdir() if path.is_dir()]
    assert folders == ["row_groups-2-of-2"]
    part(listing, tmp_path / "out", "1/2", settings)
    make_split(listing, tmp_path / "one", settings, IN_PROCESS, 10, ignore)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


# ---- publishing ---------------------------------------------------------------------------------------------------


def stopped_at(name: str, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Runs until `build.NAME` is called, and leaves everything as a killed process would."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, name, stop)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.parametrize("at", ["publish", "remove_unpacked"])  # before and after the manifest is written
def test_a_part_that_was_killed_while_it_published_is_repeated(
    at: str, listing: Listing, tmp_path: Path, expected, monkeypatch: pytest.MonkeyPatch
):
    stopped_at(at, monkeypatch, lambda: part(listing, tmp_path, "1/1"))
    assert (tmp_path / "train.unfinished" / CLAIM).is_file()
    assert isinstance(part(listing, tmp_path, "1/1"), Outcome)
    assert files_of(tmp_path) == expected


def test_a_claim_of_another_machine_is_left_to_a_final_call(listing: Listing, tmp_path: Path, expected):
    """Locks may not reach that machine, so the process may be alive."""
    part(listing, tmp_path, "1/2")
    (tmp_path / "train.unfinished" / CLAIM).write_text('{"host": "other", "boot": "b"}')
    waiting = part(listing, tmp_path, "2/2")
    assert isinstance(waiting, PartOutcome) and waiting.complete == SHARDS
    assert make_split(listing, tmp_path, SETTINGS, IN_PROCESS, 10, ignore).shards_written == 4
    assert files_of(tmp_path) == expected


def test_one_process_publishes_at_a_time_and_none_beside_a_part(tmp_path: Path):
    work = tmp_path / "train.unfinished"
    with shared(work), publishing(work) as chosen:
        assert not chosen
    with publishing(work) as chosen, publishing(work) as second:
        assert chosen and not second
    with publishing(tmp_path / "published") as chosen:
        assert not chosen
    assert [path.name for path in work.iterdir()] == [LOCK]


def test_a_set_that_is_published_while_a_part_begins_is_found(
    listing: Listing, tmp_path: Path, expected, monkeypatch: pytest.MonkeyPatch
):
    """The late part makes a work folder again; it removes it."""
    real = parts.shared

    def after_publishing(work: Path):
        make_split(listing, tmp_path, SETTINGS, IN_PROCESS, 10, ignore)
        return real(work)

    monkeypatch.setattr(parts, "shared", after_publishing)
    assert isinstance(part(listing, tmp_path, "1/2"), Outcome)
    assert files_of(tmp_path) == expected and [path.name for path in tmp_path.iterdir()] == ["train"]


def test_file_systems_without_locks(
    listing: Listing,
    tmp_path: Path,
    expected,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """One warning says what to avoid. The claim still lets one process publish; a second one is inside the first."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    second: list[Outcome | PartOutcome] = []
    real = build.publish

    def beside(*args):
        second.append(part(listing, tmp_path, "1/2"))
        return real(*args)

    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(build, "publish", beside)
    part(listing, tmp_path, "2/2")
    assert isinstance(part(listing, tmp_path, "1/2"), Outcome)
    assert isinstance(second[0], PartOutcome)
    assert files_of(tmp_path) == expected
    assert capsys.readouterr().err.count("while parts run, start no run without --part") == 1


def test_a_shard_whose_file_is_lost_is_not_published(
    listing: Listing, tmp_path: Path, expected, monkeypatch: pytest.MonkeyPatch
):
    """The part that finds it says how many are complete; the part of that shard makes it again."""
    part(listing, tmp_path, "1/2")

    def losing(job: ShardJob):
        (tmp_path / "train.unfinished/train-000000.tar").unlink(missing_ok=True)
        return run_job(job)

    with monkeypatch.context() as patch:
        patch.setattr(build, "run_job", losing)
        outcome = part(listing, tmp_path, "2/2")
    assert isinstance(outcome, PartOutcome) and outcome.complete == SHARDS - 1
    assert isinstance(part(listing, tmp_path, "1/2"), Outcome)
    assert files_of(tmp_path) == expected


# ---- the command --------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, args)])
    return main()


def test_the_command_says_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source, out = twelve_images(tmp_path / "in", bad=1), tmp_path / "out"
    options = [source, out, "--workers", 1, "--shard-samples", 4, "--json", tmp_path / "a.json"]
    assert command(monkeypatch, *options, "--part", "2/2") == 0
    assert "part 2/2 with 1 shards is complete; 1 of 3 shards of the set are" in capsys.readouterr().out
    assert command(monkeypatch, *options, "--part", "1/2") == 0
    assert "11 samples in 3 shards" in capsys.readouterr().out
    assert verify(out / "train", False, IN_PROCESS, ignore) == []


@pytest.mark.parametrize("option", ["--repair", "--verify"])
def test_modes_of_the_whole_set_refuse_a_part(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=f"--part 1/2 with {option}, which works on the whole set; omit --part"):
        command(monkeypatch, tmp_path, tmp_path / "out", "--part", "1/2", option)


def test_a_wrong_part_is_refused_before_the_source_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="--part 3/2, expected I/N"):
        command(monkeypatch, tmp_path / "none", tmp_path / "out", "--part", "3/2")
