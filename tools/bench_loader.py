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
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

# torch, DALI and numba are imported within functions, so that --help answers at once.
from pipeline.diagnosis.accounting import AU_THRESHOLD
from pipeline.loader.order import Order
from tools.shared.cli import Progress, cores, json_path, run, write_json
from tools.shared.loader_trial import check_loader, is_foreign, put_on_trial

if TYPE_CHECKING:
    from model.trainer import Trainer
    from pipeline.diagnosis.findings import Findings
    from pipeline.diagnosis.stored_shape import StoredShapes
    from pipeline.loader.settings import LoaderSettings
    from pipeline.profiling.stages import StageThroughput
    from pipeline.profiling.throughput import Throughput
    from pipeline.profiling.windows import EmulatedTrainer, WindowMeasurements
    from pipeline.rgb_pca import Eigenbasis
    from pipeline.shards.reader import ShardSet

RANK_TIMEOUT_S = 300.0  # of ranks that wait for others; this tool has one rank
PLOT_SUFFIXES = (".html", ".svg")
STAGE_NAMES = {
    "read": "read",
    "decode": "read + decode",
    "full": "read + decode + augment",
    "reread": "read again, from memory",
}


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
    bench = open_bench(arguments)
    stages, record = measure_loader(bench, arguments.cold)
    passed = True
    if (trainer := trainer_of(arguments, bench)) is not None:
        found = diagnose(bench, trainer, stages, arguments.au_threshold)
        write_plot(arguments.plot, found)
        record |= found.record()
        if arguments.verify:
            record["verified"] = verify_prediction(found, bench, trainer)
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


@dataclass(frozen=True)
class LoaderBench:
    """The loader that is measured, in windows of `window_s` seconds."""

    shards: ShardSet
    basis: Eigenbasis
    settings: LoaderSettings
    window_s: float

    def windows(self, trainer: EmulatedTrainer | Trainer) -> WindowMeasurements:
        """Measures the loader alone, the trainer on replayed batches, and both together, in turn."""
        from model.trainer import Trainer
        from pipeline.loader.loader import TrainLoader, stage_batch_sizes
        from pipeline.profiling.windows import WINDOW_ROUNDS, TrainerUnderTest, measure_windows
        from tools.shared.stall_report import REPLAYED_BATCHES, trainer_under_test

        discard = self.settings.prefetched_batches
        with Progress("training", WINDOW_ROUNDS, "rounds") as progress:
            if isinstance(trainer, Trainer):
                with TrainLoader(self.shards, self.basis, self.settings) as batches:
                    replayed = [next(batches) for _ in range(REPLAYED_BATCHES)]
                    subject = trainer_under_test(trainer, self.settings.batch)
                    return measure_windows(batches, subject, replayed, self.window_s, discard, progress=progress)
            sleeper = TrainerUnderTest[int](size=int, step=trainer)
            sizes = cast(Generator[int], stage_batch_sizes(self.shards, self.basis, self.settings, "full"))
            with closing(sizes):
                batch = [self.settings.batch]
                return measure_windows(sizes, sleeper, batch, self.window_s, discard, progress=progress)


def open_bench(arguments: argparse.Namespace) -> LoaderBench:
    """Opens what the arguments name."""
    from pipeline import rgb_pca
    from pipeline.loader.settings import LoaderSettings
    from pipeline.shards.reader import open_shards

    shards = open_shards(arguments.shards)
    basis = rgb_pca.load_for(shards, arguments.eigenbasis)
    given = {name: getattr(arguments, name) for name in ("device", "batch", "threads", "hw_decoder_load", "order")}
    chosen = {name: value for name, value in given.items() if value is not None}
    return LoaderBench(shards, basis, LoaderSettings(library=arguments.loader, **chosen), arguments.seconds)


def measure_loader(bench: LoaderBench, cold: bool) -> tuple[StageThroughput, dict[str, Any]]:
    """Measures the stages of the loader and prints them; returns them and the record for --json."""
    from pipeline.loader.inputs import order_of
    from pipeline.loader.order import shuffle_quality
    from pipeline.profiling.stages import STAGE_ROUNDS, format_storage, measure_stages, stage_windows

    shards, settings, index = bench.shards, bench.settings, bench.shards.index
    print(
        f"{shards.folder}: {len(shards):,} samples, device {settings.device}, batch {settings.batch},"
        f" {settings.threads} threads, queue {settings.queue_depth}, {STAGE_ROUNDS} rounds of {bench.window_s:g} s each"
    )
    quality = shuffle_quality(order_of(shards, settings, 0), index["shard"], index["label"], settings.batch)
    print(f"order {settings.order}: {quality}")
    with Progress("measuring", stage_windows(), "windows") as progress:
        stages = measure_stages(shards, bench.basis, settings, bench.window_s, STAGE_ROUNDS, progress, cold)
    print(stage_table({name: getattr(stages, stage) for stage, name in STAGE_NAMES.items()}))
    print(f"storage: {format_storage(stages.storage)}{'; dropped before each window' * cold}")
    return stages, {
        "shards": str(shards.folder),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
        "window_s": bench.window_s,
        "rounds": STAGE_ROUNDS,
        "cold": cold,
        "shuffle": asdict(quality),
        "stages": asdict(stages),
        "supply": stages.full.img_s,
    }


def stage_table(stages: dict[str, Throughput]) -> str:
    """Throughput of each stage as lines of text."""
    lines = [f"{'':26}{'img/s':>9}{'min':>9}{'max':>9}{'ms/img':>9}{'CPU ms/img':>12}{'cores':>7}"]
    for name, stage in stages.items():
        lines.append(
            f"{name:26}{stage.img_s:9,.0f}{stage.img_s_min:9,.0f}{stage.img_s_max:9,.0f}{1000 / stage.img_s:9.3f}"
            f"{stage.cpu_ms_per_img:12.3f}{stage.cores_used:7.2f}"
        )
    return "\n".join(lines)


def trainer_of(arguments: argparse.Namespace, bench: LoaderBench) -> EmulatedTrainer | Trainer | None:
    """The trainer that the arguments name, if they name one."""
    from pipeline.profiling.windows import EmulatedTrainer

    if arguments.trainer:
        return network(bench, arguments.width)
    return None if arguments.demand is None else EmulatedTrainer(arguments.demand)


def network(bench: LoaderBench, width: float) -> Trainer:
    """The network of 2012 with both towers in this process, at the first step of its recipe."""
    from model.alexnet import AlexNet
    from model.checkpoint import TrainState
    from model.optim import Momentum2012
    from model.parallel.exchange import TowerExchange
    from model.parallel.ranks import start
    from model.recipe import SOURCE2012, learning_rates
    from model.shapes import NetSpec
    from model.trainer import LoopSettings, Trainer
    from pipeline.loader.order import steps_per_epoch

    settings, shards = bench.settings, bench.shards
    ranks = start("towers", settings.device, RANK_TIMEOUT_S)
    spec = NetSpec(len(shards.manifest.classes), width)
    model = AlexNet(spec, SOURCE2012, ranks.place.towers, settings.seed).to(ranks.device)
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, SOURCE2012.epochs))
    loop = LoopSettings(SOURCE2012.epochs, steps_per_epoch(len(shards), settings.batch), settings.seed)
    return Trainer(model, optimizer, loop, TrainState.start(), TowerExchange(ranks, model))


def diagnose(
    bench: LoaderBench, trainer: EmulatedTrainer | Trainer, stages: StageThroughput, au_threshold: float
) -> Findings:
    """Measures loader and trainer in turn; prints the stall report and returns it."""
    from pipeline.diagnosis.findings import build_findings, format_findings
    from pipeline.diagnosis.workload import setup_of
    from pipeline.profiling.machine import describe_machine, memory_use

    environment = {
        "machine": describe_machine(),
        "shards": str(bench.shards.folder),
        "manifest_sha256": bench.shards.manifest_sha256,
        "settings": asdict(bench.settings),
    }
    setup = setup_of(bench.shards, bench.settings, cores())
    measured = bench.windows(trainer)
    found = build_findings(stages, measured, setup, memory_use(), environment, au_threshold)
    print(f"\n{format_findings(found)}\n")
    return found


def write_plot(path: Path | None, found: Findings) -> None:
    """Writes the stall report as a page or an image, by the suffix of `path`; nothing if it is None."""
    from pipeline.diagnosis.html import report_html
    from pipeline.diagnosis.svg import report_svg

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"Stall report: a trainer that consumes {found.account.demand:,.0f} img/s"
        draw_report = report_html if path.suffix == ".html" else report_svg
        path.write_text(draw_report(found, title), encoding="utf-8")


def verify_prediction(found: Findings, bench: LoaderBench, trainer: EmulatedTrainer | Trainer) -> dict[str, Any] | None:
    """Makes the first change that this tool can make (settings; the set read into memory) and measures again.

    Prints predicted against measured throughput and returns both for --json; None if there is no such change.
    """
    action = next((action for action in found.actions if action.settings or action.change == "memory"), None)
    if action is None:
        print("verify     this tool can make none of the proposed changes: nothing to measure again\n")
        return None
    if action.change == "memory":
        read_once(bench.shards)
    again = replace(bench, settings=replace(bench.settings, **action.settings)).windows(trainer)
    together = again.clocks.images / again.clocks.elapsed_s
    print(
        f"verify     {action.text}: predicted {action.together:,.0f} img/s, measured {together:,.0f}"
        f" ({together / action.together - 1:+.1%}); the loader alone {action.supply:,.0f}, measured {again.supply:,.0f}"
        f" ({again.supply / action.supply - 1:+.1%})\n"
    )
    return {**asdict(action), "measured_together": together, "measured_supply": again.supply}


def read_once(shards: ShardSet) -> None:
    """Reads every tar, so that the page cache holds it."""
    for tar in shards.tars:
        with tar.open("rb") as file:
            while file.read(2**24):
                pass


def tune_for(bench: LoaderBench, demand: float) -> dict[str, Any]:
    """Searches settings for the demand and prints the trials; returns the record for --tune's file."""
    from pipeline.diagnosis import tuning
    from pipeline.diagnosis.stored_shape import has_whole_images
    from pipeline.profiling.stages import STAGE_ROUNDS

    def measure(candidates: Mapping[str, LoaderSettings]) -> dict[str, float]:
        return tuning.paced_throughput(bench.shards, bench.basis, candidates, demand, bench.window_s, progress)

    options, shares = tuning.choices(bench.settings, cores()), tuning.decoder_shares(bench.settings)
    with Progress("tuning", STAGE_ROUNDS * sum(map(len, (*options.values(), shares))), "windows") as progress:
        best, trials = tuning.tune(bench.settings, options, measure)
        decoders = tuning.compare_decoders(best, measure)
    for trial in (*trials, *decoders):
        print(f"tune       {format_settings(trial.settings)}: {trial.img_s:,.0f} img/s")
    if decoders:
        print(f"tune       {tuning.DECODERS_DIFFER}")
    tuned: dict[str, Any] = {"settings": tuning.speed_settings(best), "demand": demand}
    tuned |= {"trials": [asdict(trial) for trial in trials], "decoders": [asdict(trial) for trial in decoders]}
    if has_whole_images(bench.shards):
        shapes = stored_shapes(replace(bench, settings=best))
        print(f"tune       {shapes}")
        if shapes.needed(demand):
            print("tune       this demand requires squares: run make_shards.py SOURCE OUT --stored square")
        tuned["stored_shape"] = asdict(shapes)
    print(f"tuned      {format_settings(tuning.speed_settings(best))}\n")
    return tuned


def stored_shapes(bench: LoaderBench) -> StoredShapes:
    """Measures the loader alone with the same images in both stored shapes."""
    from pipeline.diagnosis.stored_shape import COMPARED_IMAGES, both_shapes, measure_shapes
    from pipeline.profiling.stages import STAGE_ROUNDS

    images = min(len(bench.shards), max(COMPARED_IMAGES, bench.settings.batch))
    with ExitStack() as kept:
        with Progress("storing", 2 * images) as progress:
            sets = kept.enter_context(both_shapes(bench.shards, images, progress))
        with Progress("measuring", STAGE_ROUNDS * len(sets), "windows") as progress:
            return measure_shapes(sets, bench.basis, bench.settings, bench.window_s, progress)


def format_settings(settings: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


if __name__ == "__main__":
    run(main)
