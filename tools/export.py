"""Exports the network of a checkpoint with torch.export: one file that runs without this project.

    python tools/export.py runs/sample/checkpoints/step-000000560 alexnet.pt2

The exported program takes RGB crops, float32 (N, 3, 224, 224) with pixel values 0-255, for any N. It subtracts the mean
image of the training set and returns logits (N, classes). Both towers are in it. The class names are in the file, too:

    names = {"classes.json": ""}
    program = torch.export.load("alexnet.pt2", extra_files=names)  # fills `names`
    logits = program.module()(crops)

The file is loaded again and compared with the network on two batches before it gets its name. Exits with 1 if the
results differ by more than --tolerance, and with 2 on wrong input.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.shared.cli import json_path, parser_of, require_at_least, run


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder step-... of a run")
    add("file", type=json_path, metavar="FILE.pt2", help="file to write")
    add(
        "--tolerance", type=float, default=1e-4, metavar="X", help="largest difference of a logit; default: %(default)s"
    )
    return parser


def main() -> int:
    """Exports the network, checks the file, and returns the exit code."""
    args = arguments().parse_args()
    require_at_least(0, tolerance=args.tolerance)
    if args.file.suffix != ".pt2":
        raise ValueError(f"{args.file}: expected a name that ends with .pt2")
    from pipeline.files import write_atomically
    from tools.shared.classifier import Classifier
    from tools.shared.exported import CropClassifier, export, largest_difference

    classifier = Classifier.load(args.checkpoint)
    network = CropClassifier(classifier.model, classifier.mean)
    data = export(network, {"classes.json": json.dumps(classifier.classes)})
    found = largest_difference(network, data)
    print(f"largest difference of a logit on two batches: {found:.2g}")
    if not found <= args.tolerance:
        print(f"{args.file}: not written, the difference is above --tolerance {args.tolerance:g}")
        return 1
    args.file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.file, data)
    print(f"{args.file}: {len(classifier.classes)} classes, {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    run(main)
