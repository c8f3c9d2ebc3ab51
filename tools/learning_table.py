"""Trains every row of docs/training.md, and writes its table and its curves.

    python tools/learning_table.py data/cifar-256/train --val data/cifar-256/val       # all rows, hours on two cores
    python tools/learning_table.py data/cifar-256/train --val data/cifar-256/val --row source2012+no-lrn --seeds 1
    python tools/learning_table.py                             # only draws again what docs/training.json holds

A row is a recipe, or a recipe with one change; tools/train.py --change lists the changes. Runs that are complete are
not repeated, and an interrupted one is resumed, so the same command continues. Each run that is complete is added to
the record, with its losses and scores. Then the table in the page is replaced, and the curves are drawn. Exit codes are
those of tools/train.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.shared.cli import parser_of, require_at_least, require_positive, run

if TYPE_CHECKING:
    from tools.shared.learning_rows import Record

BEGIN, END = "<!-- table: tools/learning_table.py -->", "<!-- end of table -->"
DOCS = Path(__file__).parents[1] / "docs"


def parse() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("shards", type=Path, nargs="?", metavar="SHARDS", help="train shard set; without it nothing is trained")
    add("--val", type=Path, metavar="SHARDS", help="shard set to validate on; needed to train")
    add("--row", action="append", metavar="ROW", help="train only this row, as source2012+no-lrn; may be repeated")
    add("--seeds", type=int, default=3, metavar="N", help="train with seeds 1 to N; default: %(default)s")
    add("--steps", type=int, default=390, metavar="N", help="optimizer steps of a run; default: %(default)s")
    add("--width", type=float, default=0.125, metavar="W", help="scale of the network; default: %(default)s")
    add("--batch", type=int, default=128, metavar="N", help="images in a step; default: %(default)s")
    add("--log-every", type=int, default=6, metavar="STEPS", help="steps between two losses; default: %(default)s")
    add(
        "--runs",
        type=Path,
        default=Path("runs/learning"),
        metavar="DIR",
        help="folder of the runs; default: %(default)s",
    )
    add("--record", type=Path, default=DOCS / "training.json", metavar="FILE", help="default: docs/training.json")
    add("--page", type=Path, default=DOCS / "training.md", metavar="FILE", help="default: docs/training.md")
    add("--plot", type=Path, default=DOCS / "training.svg", metavar="FILE", help="default: docs/training.svg")
    args = parser.parse_args()
    require_at_least(1, seeds=args.seeds, steps=args.steps, batch=args.batch, log_every=args.log_every)
    require_positive(width=args.width)
    if args.shards and not args.val:
        raise ValueError("the table has validation scores; add --val SHARDS")
    return args


def main() -> int:
    """Trains what is missing, then writes record, table and curves."""
    args = parse()
    code = train(args) if args.shards else 0
    record = collect(args)
    write(record, args)
    count = f"{len(record.runs)} runs of {len(record.rows())} rows"
    print(f"{args.record}: {count}; table in {args.page}, curves in {args.plot}")
    return code


def train(args: argparse.Namespace) -> int:
    """Trains each row that is not complete, all rows with one seed before the next seed. Returns an exit code."""
    from tools.shared.learning_rows import ROWS, LearningRun, options_of
    from tools.shared.tool_runner import ToolRunner

    if unknown := set(args.row or ()) - set(ROWS):
        raise ValueError(f"no row is called {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    runner = ToolRunner()
    common = [args.shards, "--val", args.val, "--width", args.width, "--batch", args.batch, "--steps", args.steps]
    common += ["--log-every", args.log_every, "--stall-seconds", 0, "--runs", args.runs, "--resume"]
    for seed in range(1, args.seeds + 1):
        for row in args.row or ROWS:
            name = f"{row}-s{seed}"
            before = LearningRun.read(args.runs / name, args.steps)
            if before is None or before.steps < args.steps:
                code = runner.run("train", *common, *options_of(row), "--seed", seed, "--run-name", name)
                if code:
                    return code
    return 0


def collect(args: argparse.Namespace) -> Record:
    """The record with all complete runs of `--runs`.

    Raises:
        ValueError: there is neither a record nor a run.
    """
    from model.runs import RunFolder
    from tools.shared.learning_rows import LearningRun, Record

    folders = sorted(path for path in args.runs.glob("*-s*") if path.is_dir())
    found = [(run, folder) for folder in folders if (run := LearningRun.read(folder, args.steps))]
    if found:
        setting = setting_of(found[0][1], args.steps)
        before = Record.load(args.record) if args.record.is_file() else Record(setting, [])
        same = {name: value for name, value in before.setting.items() if name not in ("machine", "versions")}
        if same != {name: setting[name] for name in same}:
            raise ValueError(f"{args.record}: has runs of another setting, {same}; choose another --record FILE")
        record = Record(setting, before.runs, before.first_steps).with_runs([run for run, _ in found])
        return with_first_steps(record, Path(RunFolder(found[0][1]).config()["train"]))
    if not args.record.is_file():
        raise ValueError(
            f"{args.record}: no record, and no complete run in {args.runs}; name SHARDS and --val to train"
        )
    return Record.load(args.record)


def with_first_steps(record: Record, shards: Path) -> Record:
    """The record with the first step of every row, computed on images of the train shard set where it is missing."""
    from model.shapes import NetSpec
    from tools.shared.first_step import first_batch, slowest_change

    known = dict(record.first_steps)
    if missing := [row for row in record.rows() if row not in known]:
        spec, batch = NetSpec(record.setting["classes"], record.setting["width"]), first_batch(shards)
        known |= {row: slowest_change(row, spec, batch) for row in missing}
    return replace(record, first_steps={row: known[row] for row in record.rows()})


def setting_of(folder: Path, steps: int) -> dict[str, Any]:
    """What all runs have in common, from the folder of one of them."""
    from model.runs import RunFolder
    from pipeline.profiling.machine import describe_machine

    config = RunFolder(folder).config()
    manifests = {name: json.loads((Path(config[name]) / "manifest.json").read_text()) for name in ("train", "val")}
    must, machine = config["must_match"], describe_machine()
    return {
        "images": manifests["train"]["samples"],
        "val_images": manifests["val"]["samples"],
        "classes": must["spec"]["classes"],
        "batch": must["batch"],
        "width": must["spec"]["width"],
        "steps": steps,
        "machine": f"{machine['cores']} cores of {machine['cpu']}",
        "versions": config["versions"],
    }


def write(record: Record, args: argparse.Namespace) -> None:
    """Writes the record, the table between the two marks of the page, and the curves."""
    from tools.shared.learning_curves import curves_svg
    from tools.shared.learning_rows import table

    page = args.page.read_text() if args.page.is_file() else f"{BEGIN}\n{END}\n"
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{args.page}: needs the lines {BEGIN} and {END}, between which the table is written")
    record.save(args.record)
    args.page.write_text(f"{before}{BEGIN}\n\n{table(record)}\n\n{END}{after}")
    args.plot.write_text(curves_svg(record))


if __name__ == "__main__":
    run(main)
