"""Draws a small synthetic dataset in ILSVRC2012's own file formats, to try everything without ImageNet.

    python tools/make_sample.py OUT [--classes 12] [--train 150] [--val 30] [--seed 2012] [--workers N]
                                    [--contact-sheet FILE.jpg]

It writes two tars and a devkit into the folder OUT. Next step: `python tools/make_shards.py OUT SHARDS`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.synthetic.settings import SampleSettings
from pipeline.workers import workers_of
from tools.shared.cli import Progress, cores, run


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    defaults = SampleSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the three files and sample.json")
    parser.add_argument(
        "--classes", type=int, default=defaults.classes, metavar="N", help="classes; default: %(default)s"
    )
    parser.add_argument(
        "--train",
        type=int,
        default=defaults.train_images,
        metavar="N",
        help="training images per class; default: %(default)s",
    )
    parser.add_argument(
        "--val",
        type=int,
        default=defaults.val_images,
        metavar="N",
        help="validation images per class; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, metavar="N", help="seed of the images; default: %(default)s"
    )
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes; default: one per core")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also write an overview, one row per class")
    return parser.parse_args()


def main() -> int:
    """Draws the dataset, or reports that it is already there."""
    arguments = parse_arguments()
    settings = SampleSettings(arguments.classes, arguments.train, arguments.val, seed=arguments.seed)
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}, expected at least 1")

    from pipeline.synthetic import dataset  # NumPy, SciPy and Pillow: imported here so that --help is fast

    if dataset.already_made(arguments.out, settings):
        print(f"{arguments.out} already holds this sample: {settings.images:,} images; nothing to do")
    else:
        with (
            workers_of(arguments.workers, dataset.__name__) as workers,
            Progress("drawing", settings.images) as progress,
        ):
            dataset.make_sample(arguments.out, settings, workers, progress)
        print(f"{arguments.out}: {settings.images:,} images of {settings.classes} classes")
    if arguments.contact_sheet is not None:
        arguments.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        dataset.contact_sheet(settings).save(arguments.contact_sheet)
        print(f"{arguments.contact_sheet}: one row per class")
    return 0


if __name__ == "__main__":
    run(main)
