"""Trains AlexNet as in 2012 from a shard set, then measures whether training waited for its input (stall report).

    python tools/train.py data/sample-256/train --val data/sample-256/val --run-name first
    torchrun --nproc-per-node 2 tools/train.py data/sample-256/train --val data/sample-256/val --run-name first

Writes runs/NAME/: config.json, metrics.jsonl, train.log (what the screen shows), checkpoints/, model-card.md (what was
trained, its scores, how to load it), stall.json, report.html and trace.json (the last steps, for ui.perfetto.dev).

SIGTERM, SIGUSR1, Ctrl-C and a closed terminal end the run after the current step: it saves a checkpoint and prints the
command that continues. A second Ctrl-C ends it at once. With --resume the same command continues from the last
undamaged checkpoint, on any number of ranks, with the losses of a run that was never stopped; it also makes a stall
report that is missing. Only --lr-scale, --val, --lrn and --cuda-graph may change, and with --accept-decoder-change
--loader and --hw-decoder-load. Ranks that torchrun restarts after a failure resume by themselves. Two ranks hold one
tower each; 4, 8, ... ranks are pairs that share every batch.

Exit codes: 0 the run is complete, or SIGTERM or SIGUSR1 stopped it; 130 Ctrl-C and 129 a closed terminal stopped it; 1
the loss is not a finite number, a rank hangs, or the last checkpoint could not be saved; 2 wrong input.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model.changes import CHANGES
from model.recipe import RECIPES, SOURCE2012
from tools.shared.cli import parser_of, require_at_least, require_positive, run

# The choices of options are written out here: the modules that define them import torch, which takes seconds.
# A test compares them with the definitions.
PRECISIONS = ("float32", "tf32", "bfloat16")
LRN_FORMS = ("eager", "triton")
ORDERS = ("global", "windowed")
ON_BAD_SAMPLE = ("stop", "skip")
LOADERS = ("dali", "webdataset")
LAYOUTS = ("towers", "data")
LAYER_SETS = ("convolutions", "all-but-fc8")
LARGEST_SEED = 2**64 - 1
CHANGE_HELP = f"change one thing of the recipe; may be repeated; {', '.join(CHANGES)}"


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="train shard set, with its eigenbasis.json")
    parser.add_argument("--val", type=Path, metavar="SHARDS", help="shard set to validate on after every epoch")
    _add_run_options(parser.add_argument_group("run"))
    _add_network_options(parser.add_argument_group("network and recipe"))
    _add_step_options(parser.add_argument_group("device and ranks"))
    _add_loader_options(parser.add_argument_group("data loader"))
    _add_report_options(parser.add_argument_group("metrics and stall report"))
    return parser


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--run-name", default="alexnet", metavar="NAME", help="folder of this run in --runs; default: %(default)s")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs; default: %(default)s")
    add("--resume", action="store_true", help="continue from the run's last checkpoint; start if there is none")
    add("--resume-from", type=Path, metavar="CHECKPOINT", help="like --resume, from this checkpoint of the run")
    add("--save-every", type=int, metavar="STEPS", help="save within an epoch too; default: at its end only")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, metavar="N", help="stretch the recipe's schedule over N epochs")
    length.add_argument("--steps", type=int, metavar="N", help="stop after N optimizer steps of the full schedule")


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--recipe", choices=RECIPES, default=SOURCE2012.name, help="default: %(default)s")
    add("--change", action="append", choices=CHANGES, default=[], metavar="NAME", help=CHANGE_HELP)
    add("--width", type=float, default=1.0, metavar="W", help="scale the number of feature maps; default: 1")
    add("--batch", type=int, metavar="N", help="images in a step, over all ranks; default: the recipe's (128)")
    add("--seed", type=int, default=2012, help="seed of weights, dropout, order and crops; default: %(default)s")
    add("--lr-scale", type=float, default=1.0, metavar="X", help="scale all learning rates; default: 1")
    add("--init-from", type=Path, metavar="CHECKPOINT", help="start with layers of another trained network")
    add("--init-layers", choices=LAYER_SETS, default=LAYER_SETS[1], help="which of them; default: %(default)s")
    add("--freeze", choices=LAYER_SETS, help="keep these layers of --init-from as they are")


def _add_step_options(group: argparse._ArgumentGroup) -> None:
    add, precision = group.add_argument, "of products; float32: IEEE, as in 2012; tf32, bfloat16: faster on a GPU"
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a CUDA device")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help=f"{precision}; default: %(default)s")
    add("--lrn", choices=LRN_FORMS, default=LRN_FORMS[0], help="triton: fused kernels on a GPU; default: %(default)s")
    add("--cuda-graph", action="store_true", help="record the step once and replay it; one GPU")
    add("--layout", choices=LAYOUTS, default="towers", help="towers: one tower on each rank; default: towers")
    add("--hang-seconds", type=float, default=300.0, metavar="S", help="end the job if a rank hangs; default: 300")


def _add_loader_options(group: argparse._ArgumentGroup) -> None:
    add, bad = group.add_argument, "skip: use a substitute sample, validate without; default: stop"
    add("--loader", choices=LOADERS, default=LOADERS[0], help="webdataset: without DALI, slower; default: %(default)s")
    add("--threads", type=int, metavar="N", help="loader threads of a rank; default: its cores + 1, at most 8")
    add("--order", choices=ORDERS, default=ORDERS[0], help="windowed: read a few shards at a time; default: global")
    add("--on-bad-sample", choices=ON_BAD_SAMPLE, default="stop", help=bad)
    add("--check-crc", action="store_true", help="compare every image that is read with its CRC-32 in index.npy")
    add("--tuned", type=Path, metavar="FILE", help="use the loader settings found by bench_loader --tune FILE")
    add("--hw-decoder-load", type=float, metavar="SHARE", help="of JPEGs for a GPU's JPEG engines; changes pixels")
    add("--accept-decoder-change", action="store_true", help="resume although --loader or --hw-decoder-load differs")


def _add_report_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--log-every", type=int, default=20, metavar="STEPS", help="default: %(default)s")
    add("--tensorboard", action="store_true", help="also write event files for TensorBoard into the run's folder")
    add("--prometheus", action="store_true", help="also write metrics.prom into it, for a textfile collector")
    add("--stall-seconds", type=float, default=4.0, metavar="S", help="length of each stall measurement; 0: no report")


def check(args: argparse.Namespace) -> None:
    """Checks the numeric options and the run's name. Raises ValueError that names the option."""
    require_at_least(1, epochs=args.epochs, steps=args.steps, batch=args.batch, threads=args.threads)
    require_at_least(1, save_every=args.save_every, log_every=args.log_every)
    require_at_least(0, seed=args.seed, stall_seconds=args.stall_seconds)
    require_positive(width=args.width, lr_scale=args.lr_scale, hang_seconds=args.hang_seconds)
    require_at_least(0, hw_decoder_load=args.hw_decoder_load)
    if args.hw_decoder_load is not None and args.hw_decoder_load > 1:
        raise ValueError(f"--hw-decoder-load {args.hw_decoder_load:g}: expected a share, at most 1")
    if args.freeze and not args.init_from:
        raise ValueError(f"--freeze {args.freeze}: the layers would stay random; add --init-from CHECKPOINT")
    if args.freeze == LAYER_SETS[1] and args.init_layers == LAYER_SETS[0]:
        raise ValueError(f"--freeze {args.freeze}: fc6 and fc7 would stay random; add --init-layers {args.freeze}")
    if args.seed > LARGEST_SEED:
        raise ValueError(f"--seed {args.seed}: expected at most {LARGEST_SEED} (2**64 - 1)")
    if min(args.run_name, default=" ") < " " or {"", ".", ".."} & set(args.run_name.split("/")):
        raise ValueError(f"--run-name {args.run_name!r}: expected a folder in --runs, such as first or group/first")


def main() -> int:
    """Trains and returns the exit code."""
    args = arguments().parse_args()
    check(args)
    from tools.shared.train_command import train_from_arguments  # imports torch and DALI, which takes seconds

    return train_from_arguments(args)


if __name__ == "__main__":
    run(main)
