"""Measures the loader: throughput and CPU time of reading, decoding and the whole; whether it would keep up.

    python tools/bench_loader.py SHARDS                                     # the loader alone
    python tools/bench_loader.py SHARDS --demand 2500 --au-threshold 0.95   # would it keep up with 2,500 img/s?
    python tools/bench_loader.py SHARDS --demand 2500 --tune tuned.json     # search settings for train.py --tuned
    python tools/bench_loader.py SHARDS --trainer --verify                  # with the network; check the prediction
    python tools/bench_loader.py --loader package.module:make_loader --demand 2500      # any other loader on trial

Prints a table, with --demand or --trainer the stall report, then one line of JSON. SHARDS requires an eigenbasis.json,
which compute_pca makes. Exits with 1 if AU (accelerator utilisation, together / demand) is below --au-threshold.
docs/stall-report.md explains every figure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

# torch, DALI and numba are imported within functions, so that --help answers at once.
from pipeline.diagnosis.accounting import AU_THRESHOLD
from pipeline.loader.order import Order
from tools.shared.cli import json_path, run, write_json
from tools.shared.loader_trial import check_loader, is_foreign, put_on_trial

if TYPE_CHECKING:
    from model.trainer import Trainer
    from pipeline.diagnosis.findings import Findings
    from pipeline.profiling.windows import EmulatedTrainer
    from tools.shared.loader_bench import LoaderBench

PLOT_SUFFIXES = (".html", ".svg")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", type=Path, nargs="?", metavar="SHARDS", help="folder of a shard set")
    add("--loader", default="dali", metavar="NAME", help="dali, webdataset, or a function that makes any loader")
    add("--eigenbasis", type=Path, metavar="FILE", help="eigenbasis file; default: the one in SHARDS")
    add("--device", choices=["cpu", "cuda"], help="where images are decoded and augmented; default: cpu")
    add("--batch", type=int, metavar="N", help="images of a batch; default: 128")
    add("--threads", type=int, metavar="N", help="threads of the loader; default: one more than cores, at most 8")
    add("--hw-decoder-load", type=float, metavar="SHARE", help="of JPEGs for a GPU's JPEG engines; default: 0")
    add("--order", choices=get_args(Order), help="of samples; windowed reads few shards at a time; default: global")
    add("--cold", action="store_true", help="drop the set from the page cache before every window")
    add("--seconds", type=float, default=5.0, metavar="S", help="length of a window; default: %(default)g")
    trainer = parser.add_mutually_exclusive_group()
    demand_help = "measure with an emulated trainer of IMG_S img/s"
    trainer.add_argument("--demand", type=float, metavar="IMG_S", help=demand_help)
    trainer.add_argument("--trainer", action="store_true", help="measure with the network and recipe source2012")
    add("--width", type=float, default=1.0, metavar="W", help="of --trainer: scales its feature maps; default: 1")
    help_of_threshold = "exit with 1 if AU is below it; default: %(default)s"
    add("--au-threshold", type=float, default=AU_THRESHOLD, metavar="AU", help=help_of_threshold)
    add("--plot", type=Path, metavar="FILE", help="draw the stall report as a page (.html) or an image (.svg)")
    add("--verify", action="store_true", help="make the first change that this tool can make, and measure again")
    add("--tune", type=Path, metavar="FILE", help="search settings for the demand and write them to FILE")
    add("--json", type=json_path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args()
    trains = arguments.trainer or arguments.demand is not None
    if not trains and (arguments.verify or arguments.tune or arguments.plot):
        parser.error("--verify, --tune and --plot require --demand or --trainer")
    return arguments


def main() -> int:
    """Measures and prints; returns the exit code."""
    arguments = parse()
    check_options(arguments)
    if is_foreign(arguments.loader):
        return put_on_trial(arguments)
    from tools.shared.loader_bench import diagnose, measure_loader
    from tools.shared.loader_tuning import tune_for, verify_prediction

    bench = open_bench(arguments)
    stages, record = measure_loader(bench, arguments.cold)
    passed = True
    if (trainer := trainer_of(arguments, bench)) is not None:
        found = diagnose(bench, trainer, stages, arguments.au_threshold)
        write_plot(arguments.plot, found)
        record |= found.record()
        if arguments.verify:
            record["verified"] = verify_prediction(found, bench, trainer, stages.next_step)
        if arguments.tune is not None:
            tuned = tune_for(bench, found.account.demand)
            write_json(arguments.tune, {**tuned, "environment": found.environment})
        passed = found.account.au >= arguments.au_threshold
    print(json.dumps(record))
    write_json(arguments.json, record)
    return int(not passed)


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError if an option has a value that it cannot have."""
    from pipeline.loader.settings import LoaderSettings, check_decoder, check_device
    from pipeline.profiling.windows import EmulatedTrainer

    if arguments.demand is not None:
        EmulatedTrainer(arguments.demand)
    if not 0 < arguments.au_threshold <= 1:
        raise ValueError(f"--au-threshold {arguments.au_threshold:g}; AU is a share, above 0 and at most 1")
    if arguments.plot is not None and arguments.plot.suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--plot {arguments.plot}; expected a file name that ends in {' or '.join(PLOT_SUFFIXES)}")
    check_loader(arguments)
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds {arguments.seconds:g}, expected more than 0")
    check_device(arguments.device or LoaderSettings.device)
    check_decoder(arguments.device or LoaderSettings.device, arguments.hw_decoder_load)


def open_bench(arguments: argparse.Namespace) -> LoaderBench:
    """Opens what the arguments name."""
    from pipeline import rgb_pca
    from pipeline.loader.settings import LoaderSettings
    from pipeline.shards.reader import open_shards
    from tools.shared.loader_bench import LoaderBench

    shards = open_shards(arguments.shards)
    basis = rgb_pca.load_for(shards, arguments.eigenbasis)
    given = {name: getattr(arguments, name) for name in ("device", "batch", "threads", "hw_decoder_load", "order")}
    chosen = {name: value for name, value in given.items() if value is not None}
    return LoaderBench(shards, basis, LoaderSettings(library=arguments.loader, **chosen), arguments.seconds)


def trainer_of(arguments: argparse.Namespace, bench: LoaderBench) -> EmulatedTrainer | Trainer | None:
    """The trainer that the arguments name, if they name one."""
    from pipeline.profiling.windows import EmulatedTrainer
    from tools.shared.loader_bench import network

    if arguments.trainer:
        return network(bench, arguments.width)
    return None if arguments.demand is None else EmulatedTrainer(arguments.demand)


def write_plot(path: Path | None, found: Findings) -> None:
    """Writes the stall report as a page or an image, by the suffix of `path`; nothing if it is None."""
    from pipeline.diagnosis.html import report_html
    from pipeline.diagnosis.svg import report_svg

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"Stall report: a trainer that consumes {found.account.demand:,.0f} img/s"
        draw_report = report_html if path.suffix == ".html" else report_svg
        path.write_text(draw_report(found, title), encoding="utf-8")


if __name__ == "__main__":
    run(main)
