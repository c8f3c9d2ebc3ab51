"""One picture in, one re-encoded picture out: bytes of any format -> baseline RGB JPEG with a short side of 256.

Resizing is torch's uint8 antialiased bicubic: Pillow's bicubic to within a grey level, several times as fast.
Oddities of ImageNet: grey, CMYK, palette, alpha and 16-bit become 8-bit RGB; a PNG under a JPEG name is read as what it
is; EXIF orientation is ignored, as ImageNet training always has, and dropped.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL
import torch
from PIL import Image, features

STORED_SHAPES = ("short-side", "square")
FILTERS = ("bicubic", "lanczos", "area")
MAX_SIDE = 65_500  # libjpeg's limit


@dataclass(frozen=True)
class ResizeSettings:
    """How a picture is stored."""

    short_side: int = 256  # P 2
    stored: str = "short-side"  # the whole picture, or the central square that the 2012 net trains on (P 2)
    filter: str = "bicubic"
    quality: int = 90  # 2012: "85" in a folder's name; the author's 2014 tool: 95
    subsampling: str = "4:2:0"

    def __post_init__(self) -> None:
        if self.stored not in STORED_SHAPES:
            raise ValueError(f"stored shape {self.stored!r}, expected one of {', '.join(STORED_SHAPES)}")
        if self.filter not in FILTERS:
            raise ValueError(f"filter {self.filter!r}, expected one of {', '.join(FILTERS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality {self.quality}, expected 1 to 100")
        if self.subsampling not in ("4:2:0", "4:2:2", "4:4:4"):
            raise ValueError(f"subsampling {self.subsampling!r}, expected 4:2:0, 4:2:2 or 4:4:4")


@dataclass(frozen=True)
class Encoded:
    """A JPEG and its size in pixels."""

    jpeg: bytes
    width: int
    height: int


class Undecodable(Exception):
    """The bytes are no picture that we can store; the text is the reason."""


def transcode(data: bytes, settings: ResizeSettings) -> Encoded:
    """Decodes, resizes and re-encodes one picture. Raises Undecodable with the reason."""
    picture = _resize(decode(data, settings.short_side), settings)
    out = BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=settings.quality, subsampling=settings.subsampling)
    return Encoded(out.getvalue(), picture.shape[1], picture.shape[0])


def decode(data: bytes, short_side: int) -> np.ndarray:
    """Encoded bytes -> uint8 (H, W, 3). A JPEG over twice `short_side` is decoded at 1/2, 1/4 or 1/8 of its size, which
    libjpeg does within the inverse DCT. Raises Undecodable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures, up to the size that Pillow refuses; odd EXIF
            image = Image.open(BytesIO(data))
            width, height = image.size
            if image.format == "JPEG":
                scale = short_side / min(width, height)
                image.draft(None, (round(width * scale), round(height * scale)))
            return np.array(image if image.mode == "RGB" else _to_rgb(image))  # convert would copy RGB too
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever malformed bytes lead them to
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; convert("RGB") would clip them at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _resize(picture: np.ndarray, settings: ResizeSettings) -> np.ndarray:
    """Resizes to the short side (long side rounded, as the author's 2014 tool); `square` cuts the centre out."""
    height, width, _ = picture.shape
    side = settings.short_side
    scale = side / min(height, width)
    size = (side, round(height * scale)) if width < height else (round(width * scale), side)
    if max(size) > MAX_SIDE:
        raise Undecodable(f"{width} x {height} pixels: at short side {side} too long for a JPEG")
    if size != (width, height):
        picture = _scaled(picture, size, settings.filter)
    if settings.stored == "square":
        top, left = (size[1] - side) // 2, (size[0] - side) // 2
        picture = picture[top : top + side, left : left + side]
    return np.ascontiguousarray(picture)


def _scaled(picture: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    if filter == "bicubic":
        planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(planes, size=size[::-1], mode="bicubic", antialias=True)
        return resized[0].permute(1, 2, 0).numpy()
    shrinking = size[0] < picture.shape[1]
    area = Image.Resampling.BOX if shrinking else Image.Resampling.BICUBIC  # the 2014 tool's rule
    kernel = Image.Resampling.LANCZOS if filter == "lanczos" else area
    return np.asarray(Image.fromarray(picture).resize(size, kernel))


def library_versions() -> dict[str, str]:
    """Versions of what decides the bytes that `transcode` makes."""
    turbo = features.version("libjpeg_turbo")
    return {"pillow": PIL.__version__, "libjpeg_turbo": str(turbo), "torch": torch.__version__.partition("+")[0]}
