"""Stalls that the system plants, as on machines that people have, and what the stall report says of them.

    python -m tests.soak.system_stalls SHARDS [--only NAME ...] [--seconds S] [--copies N] [--json FILE] [--lines FILE]

A control group limits CPU time or memory, other processes use the cores, a set lies on a slow FUSE folder or a slow
block device, a training run shares its cores until its report begins. Each case runs where the machine allows it and is
skipped with the reason elsewhere. SHARDS is copied --copies times, so that the set is larger than the measurement.
Prints a table; exits with 1 if fewer than 19 of 20 diagnoses are right.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.soak.faults import copied_set, noisy_neighbours, other_process
from tests.support.block_devices import NoBlockDevice, slow_disk
from tests.support.control_groups import NoControlGroups, limited, within
from tests.support.slow_folder import NoSlowFolder, slow_folder

ROOT = Path(__file__).parents[2]
MIN_RIGHT_SHARE = 0.95
FIRST_LINES = 10
MEMORY_BYTES = 1200 * 2**20  # enough to train, and too little for a set of 15 copies beside it


@dataclass(frozen=True)
class Outcome:
    """One run of one case.

    Attributes:
        case: its name.
        verdict: of the report.
        cause: of the report.
        first_action: of the report.
        right: whether the case allows verdict, cause and first action.
        screen: the report.
        skipped: why the case did not run; empty if it did.
    """

    case: str
    verdict: str = ""
    cause: str = ""
    first_action: str = ""
    right: bool = False
    screen: str = ""
    skipped: str = ""


class Suite:
    """The set and its copies, and the length of a window."""

    def __init__(self, shards: Path, folder: Path, seconds: float, copies: int) -> None:
        self.seconds, self.folder = seconds, folder
        self.large = copied_set(shards, folder / "large", copies)
        self.small = copied_set(shards, folder / "small", copies // 4)
        self.supply = self.bench(self.large)[0]["supply"]

    def bench(self, shards: Path, *options: object, prefix: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
        """Runs bench_loader.py; returns its record and what it printed."""
        found = self.folder / "bench.json"
        args = [shards, "--seconds", self.seconds, "--json", found, *options]
        command = [*prefix, sys.executable, str(ROOT / "tools" / "bench_loader.py"), *map(str, args)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if ran.returncode not in (0, 1):
            raise RuntimeError(f"{command}: {ran.stderr[-2000:]}")
        return json.loads(found.read_text()), ran.stdout

    def drop(self) -> None:
        """Drops the sets from the page cache."""
        for tar in (*self.large.glob("*.tar"), *self.small.glob("*.tar")):
            with tar.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    # ---- the cases: each plants, measures, and returns record and screen ---------------------------------------------

    def cpu_quota(self) -> tuple[dict[str, Any], str]:
        """One core of all, by a control group."""
        with limited(cores=1) as groups:
            return self.bench(self.large, "--demand", self.supply, prefix=tuple(within(groups)))

    def neighbour(self) -> tuple[dict[str, Any], str]:
        """A process of another user on one core."""
        with other_process():
            return self.bench(self.large, "--demand", 0.8 * self.supply)

    def network_folder(self) -> tuple[dict[str, Any], str]:
        """A FUSE folder of 3 ms and 40 MB/s a read."""
        with slow_folder(self.large, self.folder / "network", 3, 40) as mount:
            return self.bench(mount, "--demand", 2 * self.supply)

    def slow_disk(self) -> tuple[dict[str, Any], str]:
        """A block device of 10 MB/s whose set is not in memory, but fits there."""
        with slow_disk(self.small, self.folder / "disk", 10_000_000) as (mount, prefix):
            return self.bench(mount, "--demand", self.supply, prefix=prefix)

    def memory_limit(self) -> tuple[dict[str, Any], str]:
        """The same, and a control group whose memory is too small for the set."""
        with ExitStack() as around:
            mount, prefix = around.enter_context(slow_disk(self.small, self.folder / "disk", 10_000_000))
            groups = around.enter_context(limited(memory_bytes=MEMORY_BYTES))
            return self.bench(mount, "--demand", self.supply, prefix=(*prefix, *within(groups)))

    def load_during_the_run(self) -> tuple[dict[str, Any], str]:
        """Other processes on every core while a run trains, and none while its report is made."""
        with TemporaryDirectory() as runs:
            args = [self.large, "--runs", runs, "--run-name", "r", "--width", 0.05, "--batch", 32, "--steps", 150]
            args += ["--device", "cpu", "--stall-seconds", 5 * self.seconds]
            command = [sys.executable, str(ROOT / "tools" / "train.py"), *map(str, args)]
            with (
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
                ) as run,
                ExitStack() as load,
            ):
                assert run.stdout is not None
                load.enter_context(noisy_neighbours(per_core=6))
                printed = ""
                for line in run.stdout:
                    if "measuring supply" in line:
                        load.close()
                    printed += line
            return json.loads((Path(runs) / "r" / "stall.json").read_text()), printed


# name: (how to plant it, allowed verdicts, allowed causes, kinds of the first action)
Case = tuple[Callable[[Suite], tuple[dict[str, Any], str]], str, str, tuple[str, ...]]
CASES: dict[str, Case] = {
    "CPU quota": (Suite.cpu_quota, "input-bound: decode|contention", "CPU quota", ("quota",)),
    "neighbour": (Suite.neighbour, "input-bound: decode|contention", "noisy neighbours", ("neighbours",)),
    "network folder": (Suite.network_folder, "input-bound: storage", "network folder", ("memory", "disk", "reads")),
    "slow disk, cold": (Suite.slow_disk, "input-bound: storage", "cold cache|bursts", ("memory",)),
    "memory limit": (Suite.memory_limit, "input-bound: storage", "memory limit", ("memory limit",)),
    "load during the run": (Suite.load_during_the_run, "contention", "noisy neighbours", ("neighbours",)),
}


def run_case(suite: Suite, name: str) -> Outcome:
    """Plants, measures and judges."""
    plant, verdicts, causes, changes = CASES[name]
    try:
        suite.drop()
        record, printed = plant(suite)
    except (NoControlGroups, NoSlowFolder, NoBlockDevice) as reason:
        return Outcome(name, skipped=str(reason))
    screen = printed[printed.index("verdict    ") :]
    verdict, cause, actions = record["verdict"], record["cause"]["name"], record["actions"]
    right = bool(re.fullmatch(verdicts, verdict) and re.fullmatch(causes, cause))
    right = right and bool(actions) and actions[0]["change"] in changes
    return Outcome(name, verdict, cause, actions[0]["text"] if actions else "", right, screen)


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table with a row for every case."""
    rows = ["| planted by the system | right | verdict | cause | first action |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(outcome.case for outcome in outcomes):
        those = [outcome for outcome in outcomes if outcome.case == name and not outcome.skipped]
        if not those:
            rows.append(f"| {name} | skipped: {next(o.skipped for o in outcomes if o.case == name)} | | | |")
            continue
        cells = [", ".join(sorted({getattr(o, what) for o in those})) for what in ("verdict", "cause", "first_action")]
        rows.append(f"| {name} | {sum(o.right for o in those)} of {len(those)} | {' | '.join(cells)} |")
    return "\n".join(rows)


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """The folder for the copies: the given one, which stays, or a temporary one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with TemporaryDirectory() as temporary:
            yield Path(temporary)


def main() -> int:
    """Runs the cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of a shard set with its eigenbasis")
    parser.add_argument("--runs", type=int, default=1, help="of every case (default 1)")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a window (default 0.5)")
    parser.add_argument("--copies", type=int, default=60, help="of the set (default 60)")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), metavar="NAME", help="run these cases")
    parser.add_argument("--scratch", type=Path, help="folder for the copies, which is kept; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    parser.add_argument("--lines", type=Path, help="write the first lines of every report to this file")
    args = parser.parse_args()
    outcomes = list[Outcome]()
    with scratch(args.scratch) as folder:
        suite = Suite(args.shards, folder, args.seconds, args.copies)
        for name in [name for _ in range(args.runs) for name in args.only]:
            outcomes.append(run_case(suite, name))
            print(
                name, "skipped" if outcomes[-1].skipped else "right" if outcomes[-1].right else "WRONG", file=sys.stderr
            )
            if args.json:
                args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    if args.lines:
        heads = [(o.case, "\n".join((o.screen or o.skipped).splitlines()[:FIRST_LINES])) for o in outcomes]
        args.lines.write_text("\n".join(f"## {case}\n\n```\n{head}\n```\n" for case, head in heads))
    print(table(outcomes))
    ran = [outcome for outcome in outcomes if not outcome.skipped]
    return int(sum(outcome.right for outcome in ran) < MIN_RIGHT_SHARE * len(ran))


if __name__ == "__main__":
    sys.exit(main())
