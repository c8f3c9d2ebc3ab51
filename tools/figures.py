"""Draws the figures of the paper, and others, as PNG or SVG.

    python tools/figures.py relu-tanh /folder/of/cifar10 --out relu-tanh.svg --json relu-tanh.json
    python tools/figures.py kernels runs/NAME/checkpoints/step-000000560 --out kernels.png
    python tools/figures.py top5 runs/NAME/checkpoints/step-000000560 data/imagenet-256/val --out top5.png
    python tools/figures.py neighbours runs/NAME/checkpoints/step-000000560 data/imagenet-256/train \\
        --queries data/imagenet-256/val --out neighbours.png
    python tools/figures.py augmentations photograph.jpg data/imagenet-256/train --out augmentations.png
    python tools/figures.py curves runs/ONE runs/OTHER --out curves.svg

relu-tanh is Figure 1 of the paper, kernels is Figure 3, top5 and neighbours are the two parts of Figure 4. The name of
the file decides the format. Needs matplotlib: pip install -e '.[figures]'. Exits with 2 on wrong input.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.shared.cli import json_path, parser_of, require_at_least, require_positive, run, write_json
from tools.shared.figures.plot import figure_path


def parse() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = parser_of(__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    out = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    out.add_argument("--out", type=figure_path, required=True, metavar="FILE", help="file to write, .png or .svg")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return figures.add_parser(name, help=text, description=text, parents=[out], allow_abbrev=False)

    _add_relu_tanh(add("relu-tanh", "Figure 1: training error with ReLU and with tanh"))
    one = add("kernels", "Figure 3: the kernels of the first layer by tower")
    one.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder step-... of a run")
    for name, text in (("top5", "Figure 4, left: the five most probable classes"), ("neighbours", "Figure 4, right")):
        one = add(name, text)
        one.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder step-... of a run")
        one.add_argument("shards", type=Path, metavar="SHARDS", help="a shard set with the classes of the checkpoint")
        one.add_argument("--images", type=int, default=8, metavar="N", help="images to show; default: %(default)s")
    one.add_argument("--queries", type=Path, metavar="SHARDS", help="where the shown images are from; default: SHARDS")
    one = add("augmentations", "what training does to one photograph, and the eigenbasis")
    one.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    one.add_argument("shards", type=Path, metavar="SHARDS", help="a training set with its eigenbasis")
    one = add("curves", "training loss and validation error of runs")
    one.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    return parser.parse_args()


def _add_relu_tanh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, nargs="?", metavar="SOURCE", help="CIFAR-10 as folders of 32 x 32 images")
    parser.add_argument("--rates", type=_numbers, metavar="A,B,...", help="learning rates to try; default: 4 of them")
    parser.add_argument("--trial-epochs", type=float, default=2.0, metavar="N", help="epochs of a try; default: 2")
    parser.add_argument("--epochs", type=float, default=60.0, metavar="N", help="epochs at most; default: 60")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="use N images; default: all")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="also write the curves to FILE")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="draw what --json wrote instead of training")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(each) for each in text.split(","))


def main() -> int:
    """Draws one figure."""
    args = parse()
    match args.figure:
        case "relu-tanh":
            drawn = relu_tanh(args)
        case "kernels":
            from tools.shared.figures import kernels

            drawn = kernels.draw(args.checkpoint, args.out)
        case "augmentations":
            from tools.shared.figures import augmentations

            drawn = augmentations.draw_figure(args.image, args.shards, args.out)
        case "curves":
            from tools.shared.figures import curves

            drawn = curves.draw(args.runs, args.out)
        case _:
            from tools.shared.figures import predictions

            require_at_least(1, images=args.images)
            if args.figure == "top5":
                drawn = predictions.draw_top5(args.checkpoint, args.shards, args.images, args.out)
            else:
                queries = args.queries or args.shards
                drawn = predictions.draw_neighbours(args.checkpoint, args.shards, queries, args.images, args.out)
    print(f"{args.out}: {drawn}")
    return 0


def relu_tanh(args: argparse.Namespace) -> str:
    """Trains with both activations, or reads the curves of an earlier run, and draws them. Returns what was drawn."""
    require_positive(trial_epochs=args.trial_epochs, epochs=args.epochs)
    require_at_least(0, images=args.images)
    if (args.source is None) == (args.from_json is None):
        raise ValueError("relu-tanh: name either SOURCE, a folder of CIFAR-10, or --from-json FILE")
    from tools.shared.figures import plot
    from tools.shared.figures import relu_tanh as experiment

    if args.from_json is not None:
        try:
            record = json.loads(args.from_json.read_text())
            curves = experiment.curves_of(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{args.from_json}: expected a file that relu-tanh --json wrote ({error})") from error
    else:
        rates = {"learning_rates": args.rates} if args.rates else {}
        rules = experiment.Comparison(
            trial_epochs=args.trial_epochs, max_epochs=args.epochs, images=args.images, **rates
        )
        images, labels = experiment.read_images(args.source, args.images)
        curves = experiment.compare(rules, images, labels)
        record = experiment.record_of(rules, curves, len(labels))
        write_json(args.json, record)
    plot.save(experiment.relu_tanh_figure(curves), args.out)
    for name, each in curves.items():
        reached = each[-1].epochs_to_target
        result = f"{reached:.2f} epochs" if reached else f"not reached in {each[-1].settings.max_epochs:g} epochs"
        rate = f"learning rate {each[-1].settings.learning_rate:g}"
        print(f"{name}: {record['target_error']:.0%} training error: {result}, {rate}")
    ratio = record["ratio_of_epochs"]
    return f"ratio of epochs, tanh to ReLU: {ratio:.2f}" if ratio else "no ratio: one did not reach the target"


if __name__ == "__main__":
    run(main)
