"""Scores checkpoints on a shard set: top-1, top-5 and loss of the centre crop, or of ten views averaged.

    python tools/evaluate.py data/imagenet-256/val runs/NAME/checkpoints/step-000910000 --views 10
    torchrun --nproc-per-node 2 tools/evaluate.py data/imagenet-256/val CHECKPOINT --views 10

Prints a line for each checkpoint and, for several, a line for their ensemble: the mean of their class probabilities.
--fit-weights fits a weight for each checkpoint to the top-5 score on another shard set. --per-class and --confusion
show which classes are taken for which, for the only checkpoint or for the ensemble. The ten views are those of the
paper (section 4.1): four corners and the centre, and their mirror images. With torchrun every rank scores a part of the
images; the result does not depend on the number of ranks.

The classes and the mean image are those that the checkpoint stores, so the training set is not needed. If SHARDS has
other classes, or the training set beside it (the folder "train", or --train) another mean, the score would mean
nothing: that is refused unless --force is given. Exits with 2 on wrong input.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.shared.cli import json_path, parser_of, require_at_least, run

if TYPE_CHECKING:
    from model.parallel.ranks import Ranks
    from pipeline.loader.settings import Device

FIGURE_SUFFIXES = (".svg", ".png")
LOADERS = ("dali", "webdataset")
RANK_TIMEOUT_S = 3600.0  # ranks meet after all images are scored; a slow machine may be that much later


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="the shard set to score on")
    add("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a folder step-... of a run")
    add("--views", type=int, choices=(1, 10), default=1, help="views of an image; default: %(default)s")
    add("--fit-weights", type=Path, metavar="SHARDS", help="fit the weights of the ensemble to the top-5 on this set")
    add("--per-class", type=json_path, metavar="FILE.csv", help="write the scores of every class to FILE.csv")
    add("--confusion", type=json_path, metavar="FILE", help="draw the confusion matrix as FILE.svg or FILE.png")
    add("--train", type=Path, metavar="SHARDS", help="compare the mean with this set; default: train")
    add("--force", action="store_true", help="score although classes or mean differ")
    add("--on-bad-sample", choices=("stop", "skip"), default="stop", help="skip: score without it")
    add("--loader", choices=LOADERS, default=LOADERS[0], help="webdataset: without DALI; default: %(default)s")
    add("--batch", type=int, default=128, metavar="N", help="views at a time, over all ranks; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a CUDA device")
    add("--json", type=json_path, metavar="FILE", help="also write the scores to FILE")
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the options. Raises ValueError that names the option."""
    require_at_least(1, batch=args.batch)
    if args.confusion is not None and args.confusion.suffix not in FIGURE_SUFFIXES:
        expected = f"expected a name that ends with {' or '.join(FIGURE_SUFFIXES)}"
        raise ValueError(f"--confusion {args.confusion}: {expected}")
    if args.fit_weights and len(args.checkpoints) < 2:
        raise ValueError("--fit-weights: one checkpoint given, expected at least two; name more, or omit it")


def main() -> int:
    """Scores all checkpoints and returns the exit code."""
    args = arguments().parse_args()
    check(args)
    # Imported here, so that --help does not wait for torch and DALI.

    from model.parallel.ranks import start
    from tools.shared.rank_agreement import is_lost_connection
    from tools.shared.rank_choice import default_device

    device: Device = args.device or default_device()
    ranks = start("data", device, RANK_TIMEOUT_S)
    try:
        evaluate(args, device, ranks)
        ranks.leave()
    except RuntimeError as error:
        if ranks.place.world == 1 or not is_lost_connection(error) or os.environ.get("TRACEBACK"):
            raise
        print(f"evaluate.py: rank {ranks.place.rank}: another rank ended; its own message says why", file=sys.stderr)
        return 1
    return 0


def evaluate(args: argparse.Namespace, device: Device, ranks: Ranks) -> None:
    """Scores all checkpoints on this rank's part of the images; the first rank prints and writes the results."""
    from model.ensemble import equal_weights, fit_weights
    from pipeline.loader.settings import LoaderSettings, check_device, check_library
    from tools.shared.job import default_loader_threads
    from tools.shared.rank_agreement import first_rank_first
    from tools.shared.scoring import Scoring, open_nets, probabilities_and_labels, score
    from tools.shared.scoring_output import write_results

    first_rank_first(ranks.meeting, lambda: check_device(device))
    first_rank_first(ranks.meeting, lambda: check_library(args.loader))
    shards, fit_on, nets = first_rank_first(ranks.meeting, lambda: open_nets(args, ranks.device))
    settings = LoaderSettings(
        batch=max(1, args.batch // args.views),
        device=device,
        library=args.loader,
        threads=default_loader_threads(),
        on_bad_sample=args.on_bad_sample,
    )
    scoring = Scoring(nets, settings, args.views, ranks)
    weights = equal_weights(len(nets))
    if fit_on is not None:
        weights = fit_weights(*probabilities_and_labels(scoring, fit_on), ranks)
    result = score(scoring, shards, weights)
    if ranks.first:
        write_results(args, result, shards, fit_on)


if __name__ == "__main__":
    run(main)
