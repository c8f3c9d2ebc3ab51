"""Draws a small set in ILSVRC2012's own files: two tars and a devkit, for trying everything without ImageNet.

    python tools/make_sample.py OUT [--classes 12] [--train 150] [--val 30] [--seed 2012] [--workers N]
                                    [--contact-sheet FILE.jpg]

Then: `python tools/make_shards.py OUT SHARDS`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.synthetic.dataset import SampleSettings, already_made, contact_sheet, make_sample
from pipeline.workers import workers_of
from tools.shared.cli import Progress, cores, run


def main() -> int:
    """Draws the sample, or says that it is there already."""
    defaults = SampleSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the three files and sample.json")
    parser.add_argument("--classes", type=int, default=defaults.classes)
    parser.add_argument("--train", type=int, default=defaults.train_images, help="training images per class")
    parser.add_argument("--val", type=int, default=defaults.val_images, help="validation images per class")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--workers", type=int, default=cores(), help="processes that draw")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also write a picture of a row per class")
    arguments = parser.parse_args()

    settings = SampleSettings(arguments.classes, arguments.train, arguments.val, seed=arguments.seed)
    if already_made(arguments.out, settings):
        print(f"{arguments.out} already holds this sample: {settings.images:,} images; nothing to do")
    else:
        with (
            workers_of(arguments.workers, make_sample.__module__) as workers,
            Progress("drawing", settings.images) as progress,
        ):
            make_sample(arguments.out, settings, workers, progress)
        print(f"{arguments.out}: {settings.images:,} images of {settings.classes} classes")
    if arguments.contact_sheet is not None:
        arguments.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(settings).save(arguments.contact_sheet)
        print(f"{arguments.contact_sheet}: a row per class")
    return 0


if __name__ == "__main__":
    run(main)
