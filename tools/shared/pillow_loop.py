"""The plain way to make small images: a loop of Pillow over the files of a folder. A baseline of bench_sharding.

    python -m tools.shared.pillow_loop SOURCE OUT

Writes OUT/000000.jpg and so on, with the size, filter, quality and chroma subsampling of make_shards. Imports nothing
else, so that it starts as fast as such a script can.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

SHORT_SIDE, QUALITY, SUBSAMPLING = 256, 90, "4:2:0"  # the defaults of ResizeSettings, which a test compares


def main(source: Path, out: Path) -> None:
    """Resizes every file below `source`."""
    out.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        with Image.open(path) as image:
            scale = SHORT_SIDE / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small.save(out / f"{number:06d}.jpg", "JPEG", quality=QUALITY, subsampling=SUBSAMPLING)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
