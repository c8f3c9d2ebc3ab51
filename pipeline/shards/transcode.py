"""One picture in, one re-encoded picture out: bytes of any format -> baseline RGB JPEG with a short side of 256.

`transcode` is `decode`, `resize` and `encode`, one after the other. Plain JPEGs take a quick road through
libjpeg-turbo; whatever it does not take without a complaint goes to Pillow, whose verdict stands. Both give the same
pixels.
Oddities of ImageNet: grey, CMYK, palette, alpha and 16-bit become 8-bit RGB; a PNG under a JPEG name is read as what it
is; EXIF orientation is ignored unless asked for, as ImageNet training always has, and dropped.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError, features

STORED_SHAPES = ("short-side", "square")
FILTERS = ("lanczos", "bicubic", "area")
SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow has more, some of which start other programs
MAX_SIDE = 65_500  # libjpeg's limit
MAX_PIXELS = 2**26  # of the source: some 400 MB while it is decoded, whatever its format; ImageNet's have less
EXIF_ORIENTATION = 0x0112
EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ResizeSettings:
    """How a picture is stored."""

    short_side: int = 256  # P 2
    stored: str = "short-side"  # the whole picture, or the central square that the 2012 net trains on (P 2)
    filter: str = "lanczos"
    quality: int = 90  # 2012: "85" in a folder's name; the author's 2014 tool: 95
    subsampling: str = "4:2:0"
    apply_exif: bool = False  # turn a picture as its camera says

    def __post_init__(self) -> None:
        if self.stored not in STORED_SHAPES:
            raise ValueError(f"stored shape {self.stored!r}, expected one of {', '.join(STORED_SHAPES)}")
        if self.filter not in FILTERS:
            raise ValueError(f"filter {self.filter!r}, expected one of {', '.join(FILTERS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality {self.quality}, expected 1 to 100")
        if self.subsampling not in SUBSAMPLINGS:
            raise ValueError(f"subsampling {self.subsampling!r}, expected one of {', '.join(SUBSAMPLINGS)}")


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
    return encode(resize(decode(data, settings), settings), settings)


def decode(data: bytes, settings: ResizeSettings) -> np.ndarray:
    """Encoded bytes -> uint8 (H, W, 3). A JPEG over twice the short side is decoded at 1/2, 1/4 or 1/8 of its size,
    which libjpeg does within the inverse DCT. Raises Undecodable."""
    if not settings.apply_exif and (picture := _plain_jpeg(data, settings.short_side)) is not None:
        return picture
    try:
        return _by_pillow(data, settings)
    except (MemoryError, Undecodable):
        raise
    except UnidentifiedImageError as error:  # its text holds an address in memory: another one in every run
        raise Undecodable(f"no picture in a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise whatever malformed bytes lead them to
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def _plain_jpeg(data: bytes, short_side: int) -> np.ndarray | None:
    """A grey or YCbCr JPEG without any irregularity, in a fifth less time than Pillow takes; None for all else."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray"):
            return None
        _check_size(width, height)
        divisor = _divisor(width, height, short_side)
        rows, columns = -(-height // divisor), -(-width // divisor)
        picture: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns, min_factor=2)
        return picture
    except (ValueError, KeyError):  # a fault, maybe no more than a warning, which Pillow tells; KeyError: odd sampling
        return None


def _by_pillow(data: bytes, settings: ResizeSettings) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF; sizes are judged below
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
        width, height = image.size
        _check_size(width, height)
        if image.format in ("JPEG", "MPO"):
            divisor = _divisor(width, height, settings.short_side)
            image.draft(None, (width // divisor, height // divisor))
        if settings.apply_exif:
            image = _turned(image)
        return np.array(image if image.mode == "RGB" else _to_rgb(image))  # convert would copy RGB too


def _turned(image: Image.Image) -> Image.Image:
    """The picture upright. ImageOps.exif_transpose also writes the EXIF anew, and fails where that is damaged."""
    image.load()  # so that a fault of the picture is not taken for one of its EXIF
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # parsers raise whatever a damaged EXIF leads them to; then it says nothing
        return image
    return image.transpose(EXIF_TURNS[orientation]) if orientation in EXIF_TURNS else image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Undecodable(f"{width} x {height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?")


def _divisor(width: int, height: int, short_side: int) -> int:
    """The most of 1, 2, 4 and 8 by which both sides can be divided and still be as long as in the result, whose size
    stays what it would be."""
    wanted = _stored_size(width, height, short_side)
    for divisor in (8, 4, 2):
        enough = width >= divisor * wanted[0] and height >= divisor * wanted[1]
        if enough and _stored_size(-(-width // divisor), -(-height // divisor), short_side) == wanted:
            return divisor
    return 1


def _stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) once the short side is what it shall be; the long side rounded, as the author's 2014 tool."""
    scale = short_side / min(width, height)
    return (short_side, round(height * scale)) if width < height else (round(width * scale), short_side)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; convert("RGB") would clip them at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resize(picture: np.ndarray, settings: ResizeSettings) -> np.ndarray:
    """uint8 (H, W, 3) to the short side; `square` cuts the centre out. Raises Undecodable where the long side is too
    long for a JPEG."""
    height, width, _ = picture.shape
    side = settings.short_side
    size = _stored_size(width, height, side)
    if max(size) > MAX_SIDE:
        raise Undecodable(f"{width} x {height} pixels: at short side {side} too long for a JPEG")
    if size != (width, height):
        picture = _scaled(picture, size, settings.filter)
    if settings.stored == "square":
        top, left = (size[1] - side) // 2, (size[0] - side) // 2
        picture = picture[top : top + side, left : left + side]
    return np.ascontiguousarray(picture)


def _scaled(picture: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    if filter in ("bicubic", "lanczos"):  # Pillow's kernels, in a sixth of its time
        # strides that torch takes for channels_last: else it answers in planes, and turning those takes as long again
        pixels = torch.from_numpy(picture).unsqueeze(0).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(pixels, size=size[::-1], mode=filter, antialias=True)
        return resized.permute(0, 2, 3, 1)[0].numpy()
    shrinking = size[0] < picture.shape[1]
    kernel = Image.Resampling.BOX if shrinking else Image.Resampling.BICUBIC  # the 2014 tool's rule
    return np.asarray(Image.fromarray(picture).resize(size, kernel))


def encode(picture: np.ndarray, settings: ResizeSettings) -> Encoded:
    """uint8 (H, W, 3), contiguous -> a baseline JPEG."""
    subsampling = settings.subsampling.replace(":", "")
    jpeg = simplejpeg.encode_jpeg(picture, settings.quality, "RGB", subsampling)
    return Encoded(jpeg, picture.shape[1], picture.shape[0])


def library_versions() -> dict[str, str]:
    """Versions of what decides the bytes that `transcode` makes."""
    turbo = features.version("libjpeg_turbo")
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": str(turbo),
        "simplejpeg": simplejpeg.__version__,
        "torch": torch.__version__.partition("+")[0],
    }
