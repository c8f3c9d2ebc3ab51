"""Images for tests, made of smooth colours, and their encoded files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photo(width: int, height: int) -> Image.Image:
    """A smooth coloured image with some detail."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = [128 + 100 * np.sin(x / (17 + 9 * c) + y / (23 - 5 * c)) for c in range(3)]
    return Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """The bytes of a file that holds the image. `options` are those of Pillow's writer."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()
