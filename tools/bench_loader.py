"""How fast the feed is and where its time goes: reading, decoding, and the whole, in img/s and CPU time.

    python tools/bench_loader.py SHARDS [--device cpu|cuda] [--batch N] [--threads N] [--order global|windowed] [--cold]
                                        [--seconds S] [--json FILE]
                                        [--demand IMG_S | --trainer [--width W]]
                                        [--au-threshold 0.95] [--plot FILE] [--verify] [--tune FILE]

Prints a table for people, then one line of JSON for programs. Wants SHARDS/eigenbasis.json, which compute_pca makes.
Says which share of the set is in the page cache; with --cold the kernel forgets the set before every window.
With --demand, a trainer that takes so many images a second and no core (it sleeps) is fed for a while, with --trainer
the network itself: the stall report of that, and exit code 1 where it waits so much that AU is below the bar. --plot
draws it, as a page (FILE.html) or as a picture (FILE.svg). --verify makes the first proposed change that it can make
(settings; the set read into memory), and measures again. --tune searches the settings for that demand, which train.py
--tuned FILE takes, and says what squares instead of whole pictures would bring.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.optim import Momentum2012
from model.parallel.exchange import TowerExchange
from model.parallel.ranks import start
from model.recipe import SOURCE2012, learning_rates
from model.shapes import NetSpec
from model.trainer import LoopSettings, Trainer
from pipeline import rgb_pca
from pipeline.diagnosis.accounting import AU_THRESHOLD
from pipeline.diagnosis.findings import Findings, build_findings, format_findings, setup_of
from pipeline.diagnosis.html import report_html
from pipeline.diagnosis.stored_shape import PICTURES, StoredShapes, both_shapes, has_whole_images
from pipeline.diagnosis.svg import report_svg
from pipeline.diagnosis.tuning import HEADROOM, choices, speed_of, tune
from pipeline.loader.inputs import order_of
from pipeline.loader.loader import TrainLoader, stage_batch_sizes
from pipeline.loader.order import Order, shuffle_quality, steps_per_epoch
from pipeline.loader.settings import LoaderSettings, check_device
from pipeline.profiling import windows as doctor
from pipeline.profiling.machine import describe_machine, memory_use
from pipeline.profiling.stages import ROUNDS, measure_stages, storage_in_words, windows
from pipeline.profiling.throughput import Throughput, measure_throughput
from pipeline.profiling.windows import EmulatedTrainer, TrainerUnderTest, WindowMeasurements, measure_windows
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet, open_shards
from tools.shared.cli import Progress, cores, run, write_json
from tools.shared.stall_report import REPLAYED, subject_of

TIMEOUT_S = 300.0  # of ranks that wait for others: here is one
PLOTS = {".html": report_html, ".svg": report_svg}
WORK = {
    "read": "read",
    "decode": "read + decode",
    "full": "read + decode + augment",
    "reread": "read again, from memory",
}


def main() -> int:
    """Measures and prints; returns the exit code."""
    arguments = _arguments()
    trainer: EmulatedTrainer | Trainer | None = None
    if arguments.demand is not None:
        trainer = EmulatedTrainer(arguments.demand)
    if not 0 < arguments.au_threshold <= 1:
        raise ValueError(f"--au-threshold {arguments.au_threshold:g}; AU is a share, above 0 and at most 1")
    if arguments.plot is not None and arguments.plot.suffix not in PLOTS:
        raise ValueError(f"--plot {arguments.plot}; expected a file name that ends in {' or '.join(PLOTS)}")
    check_device(arguments.device)
    shards = open_shards(arguments.shards)
    basis = rgb_pca.load(arguments.eigenbasis or arguments.shards / "eigenbasis.json", shards)
    changes = {} if arguments.threads is None else {"threads": arguments.threads}
    settings = LoaderSettings(batch=arguments.batch, device=arguments.device, order=arguments.order, **changes)
    print(
        f"{arguments.shards}: {len(shards):,} samples, device {settings.device}, batch {settings.batch}, "
        f"{settings.threads} threads, "
        f"queue {settings.queue_depth}, {ROUNDS} rounds of {arguments.seconds:g} s each"
    )
    index = shards.index
    quality = shuffle_quality(order_of(shards, settings, 0), index["shard"], index["label"], settings.batch)
    print(f"order {settings.order}: {quality}")
    with Progress("measuring", windows(), "windows") as progress:
        stages = measure_stages(shards, basis, settings, arguments.seconds, ROUNDS, progress, arguments.cold)
    print(table({words: getattr(stages, stage) for stage, words in WORK.items()}))
    print(f"storage: {storage_in_words(stages.storage)}{'; forgotten before each window' * arguments.cold}")
    record = {
        "shards": str(arguments.shards),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
        "seconds": arguments.seconds,
        "rounds": ROUNDS,
        "cold": arguments.cold,
        "shuffle": asdict(quality),
        "stages": asdict(stages),
    }
    found = None
    if arguments.trainer:
        trainer = network(shards, settings, arguments.width)
    if trainer is not None:
        bench = Bench(shards, basis, settings, trainer, arguments.seconds)
        about = {
            "machine": describe_machine(),
            **{name: record[name] for name in ("shards", "manifest_sha256", "settings")},
        }
        found = build_findings(
            stages, bench.fed(), setup_of(shards, settings, cores()), memory_use(), about, arguments.au_threshold
        )
        print(f"\n{format_findings(found)}\n")
        record["stall"] = found.record()
        write_page(arguments.plot, found)
        if arguments.verify:
            record["verified"] = verified(found, bench)
        if arguments.tune is not None:
            write_json(arguments.tune, {**tuned_for(bench, found.report.demand), "fingerprint": about})
    print(json.dumps(record))
    write_json(arguments.json, record)
    return int(found is not None and found.report.au < arguments.au_threshold)


@dataclass(frozen=True)
class Bench:
    """A feed and a trainer, to be measured in windows of `seconds`."""

    shards: ShardSet
    basis: Eigenbasis
    settings: LoaderSettings
    trainer: EmulatedTrainer | Trainer
    seconds: float

    def fed(self) -> WindowMeasurements:
        """The feed alone, the trainer on batches that are there, and both together."""
        discard = self.settings.prefetched_batches
        with Progress("feeding the trainer", doctor.ROUNDS, "rounds") as progress:
            if isinstance(self.trainer, Trainer):
                with TrainLoader(self.shards, self.basis, self.settings) as batches:
                    kept = [next(batches) for _ in range(REPLAYED)]
                    subject = subject_of(self.trainer, self.settings.batch)
                    return measure_windows(batches, subject, kept, self.seconds, discard, progress=progress)
            with closing(
                cast(Generator[int], stage_batch_sizes(self.shards, self.basis, self.settings, "full"))
            ) as sizes:
                sleeper = TrainerUnderTest[int](size=int, step=self.trainer)
                return measure_windows(sizes, sleeper, [self.settings.batch], self.seconds, discard, progress=progress)


def network(shards: ShardSet, settings: LoaderSettings, width: float) -> Trainer:
    """The network of 2012, both towers here, as train.py begins it."""
    ranks = start("towers", settings.device, TIMEOUT_S)
    spec = NetSpec(len(shards.manifest.classes), width)
    model = AlexNet(spec, SOURCE2012, ranks.place.towers, settings.seed).to(ranks.device)
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, SOURCE2012.epochs))
    loop = LoopSettings(SOURCE2012.epochs, steps_per_epoch(len(shards), settings.batch), settings.seed)
    return Trainer(model, optimizer, loop, TrainState.start(), TowerExchange(ranks, model))


def write_page(path: Path | None, found: Findings) -> None:
    """The findings as a page or a picture (nothing where `--plot` was not given)."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"Stall report: a trainer that takes {found.report.demand:,.0f} img/s"
        path.write_text(PLOTS[path.suffix](found, title), encoding="utf-8")


def verified(found: Findings, bench: Bench) -> dict[str, Any] | None:
    """Makes the first change that it can, measures again and prints predicted against measured."""
    action = next((action for action in found.actions if action.settings or action.change == "memory"), None)
    if action is None:
        print("verify     no proposed change is one that this tool can make: nothing to measure again\n")
        return None
    if action.change == "memory":
        warm(bench.shards)
    again = replace(bench, settings=replace(bench.settings, **action.settings)).fed()
    measured = again.clocks.images / again.clocks.elapsed_s
    print(
        f"verify     {action.text}: predicted {action.together:,.0f} img/s, measured {measured:,.0f}"
        f" ({measured / action.together - 1:+.1%}); the feed alone {action.supply:,.0f}, measured {again.supply:,.0f}"
        f" ({again.supply / action.supply - 1:+.1%})\n"
    )
    return {**asdict(action), "measured": measured, "measured_supply": again.supply}


def warm(shards: ShardSet) -> None:
    """Reads every tar once."""
    for tar in shards.tars:
        with tar.open("rb") as file:
            while file.read(2**24):
                pass


def tuned_for(bench: Bench, demand: float) -> dict[str, Any]:
    """Searches and prints; the record for --tune's file."""
    eager = EmulatedTrainer(demand * HEADROOM)

    def paced(settings: LoaderSettings) -> Iterator[int]:
        for images in stage_batch_sizes(bench.shards, bench.basis, settings, "full"):
            eager(images)
            yield images

    def measure(rivals: Mapping[str, LoaderSettings]) -> dict[str, float]:
        feeds = {name: partial(paced, rival) for name, rival in rivals.items()}
        discard = max(rival.prefetched_batches for rival in rivals.values())
        rates = measure_throughput(feeds, bench.seconds, ROUNDS, progress, discard)
        return {name: rate.img_s for name, rate in rates.items()}

    options = choices(bench.settings, cores())
    with Progress("tuning", ROUNDS * sum(map(len, options.values())), "windows") as progress:
        best, trials = tune(bench.settings, options, measure)
    for trial in trials:
        print(f"tune       {in_words(trial.settings)}: {trial.img_s:,.0f} img/s")
    tuned = {"settings": speed_of(best), "demand": demand, "trials": [asdict(trial) for trial in trials]}
    if has_whole_images(bench.shards):
        shapes = stored_shapes(replace(bench, settings=best))
        print(f"tune       {shapes}")
        if shapes.needed(demand):
            print("tune       the demand asks for squares: shard again with make_shards.py SOURCE OUT --stored square")
        tuned["stored_shape"] = asdict(shapes)
    print(f"tuned      {in_words(speed_of(best))}\n")
    return tuned


def stored_shapes(bench: Bench) -> StoredShapes:
    """Measures the feed alone with the same pictures stored either way."""
    pictures = min(len(bench.shards), max(PICTURES, bench.settings.batch))
    with ExitStack() as kept:
        with Progress("storing", 2 * pictures) as progress:
            sets = kept.enter_context(both_shapes(bench.shards, pictures, progress))
        number = len(sets["square"])
        settings = replace(bench.settings, batch=min(bench.settings.batch, number))
        feeds = {
            shape: partial(stage_batch_sizes, shards, bench.basis, settings, "full") for shape, shards in sets.items()
        }
        with Progress("measuring", ROUNDS * len(feeds), "windows") as progress:
            rates = measure_throughput(feeds, bench.seconds, ROUNDS, progress, settings.prefetched_batches)
    return StoredShapes.of(number, rates["square"], rates["short-side"])


def in_words(settings: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def table(rates: dict[str, Throughput]) -> str:
    """Rates as lines for people."""
    lines = [f"{'':26}{'img/s':>9}{'min':>9}{'max':>9}{'ms/img':>9}{'CPU ms/img':>12}{'cores':>7}"]
    for name, rate in rates.items():
        lines.append(
            f"{name:26}{rate.img_s:9,.0f}{rate.img_s_min:9,.0f}{rate.img_s_max:9,.0f}{1000 / rate.img_s:9.3f}"
            f"{rate.cpu_ms_per_img:12.3f}{rate.cores_used:7.2f}"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of a shard set")
    parser.add_argument("--eigenbasis", type=Path, help="default: SHARDS/eigenbasis.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=LoaderSettings.device)
    parser.add_argument("--batch", type=int, default=LoaderSettings.batch)
    parser.add_argument("--threads", type=int, help="DALI's; default: cores + 1, at most 8")
    parser.add_argument("--order", choices=get_args(Order), default=LoaderSettings.order)
    parser.add_argument("--cold", action="store_true", help="have the kernel forget the set before every window")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one window (default 5)")
    fed = parser.add_mutually_exclusive_group()
    fed.add_argument("--demand", type=float, metavar="IMG_S", help="of a trainer to be fed on trial")
    fed.add_argument("--trainer", action="store_true", help="feed the network itself on trial, with recipe source2012")
    parser.add_argument("--width", type=float, default=1.0, metavar="W", help="scales the network's maps (default 1)")
    parser.add_argument("--au-threshold", type=float, default=AU_THRESHOLD, help="exit with 1 below (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the report as a page (.html) or picture (.svg)")
    parser.add_argument("--verify", action="store_true", help="make the first proposed change and measure again")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="search settings for the demand, write them here")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    fed_on_trial = arguments.trainer or arguments.demand is not None
    if not fed_on_trial and (arguments.verify or arguments.tune or arguments.plot):
        parser.error("--verify, --tune and --plot want a --demand or --trainer")
    return arguments


if __name__ == "__main__":
    run(main)
