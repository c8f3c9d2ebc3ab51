"""Transcodes one image: encoded bytes of any supported format in, a baseline RGB JPEG with a short side of 256 out.

`transcode` is `decode`, `resize` and `encode` in sequence. Regular JPEGs are decoded by libjpeg-turbo through
simplejpeg, which is faster. Everything else, including every JPEG that libjpeg-turbo warns about, is decoded by Pillow,
which decides whether the image is usable. Both decoders give the same pixels.

Irregular images occur in ImageNet: grey, CMYK, palette, alpha and 16-bit images become 8-bit RGB; a PNG with a JPEG's
file name is read as a PNG. The EXIF orientation is ignored unless `ResizeSettings.apply_exif` is set, and no EXIF is
stored.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO

import numpy as np
import PIL
import simplejpeg
from PIL import Image, UnidentifiedImageError, features

from pipeline.imagenet.entries import FORMATS
from pipeline.shards.settings import ResizeSettings

MAX_JPEG_SIDE = 65_500  # pixels; libjpeg's limit
MAX_PIXELS = 2**26  # of a source image; decoding that many takes about 400 MB. ImageNet's images have fewer.
EXIF_ORIENTATION_TAG = 0x0112
TIFF_BITS_PER_SAMPLE = 258
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Encoded:
    """A JPEG and its size in pixels."""

    jpeg: bytes
    width: int
    height: int


class Undecodable(Exception):
    """The bytes are not an image that can be stored. The text is the reason, and goes into the manifest."""


def transcode(data: bytes, settings: ResizeSettings) -> Encoded:
    """Decodes, resizes and re-encodes one image.

    Raises:
        Undecodable: The image cannot be decoded or stored.
    """
    return encode(resize(decode(data, settings), settings), settings)


def decode(data: bytes, settings: ResizeSettings) -> np.ndarray:
    """Decodes an image of one of FORMATS.

    A JPEG of at least twice the stored size is decoded at 1/2, 1/4 or 1/8 of its size, which libjpeg does within the
    inverse DCT and which saves most of the time.

    Returns:
        Pixels, uint8 (H, W, 3).

    Raises:
        Undecodable: The bytes are damaged, of another format, or promise more than MAX_PIXELS.
    """
    if not data:
        raise Undecodable("no image bytes")
    if not settings.apply_exif and (pixels := _decode_regular_jpeg(data, settings.short_side)) is not None:
        return pixels
    try:
        pixels = _decode_with_pillow(data, settings)
    except (MemoryError, Undecodable):
        raise
    except UnidentifiedImageError as error:  # its text holds a memory address, which differs between runs
        raise Undecodable(f"not an image in a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # on malformed bytes, decoders raise many kinds of errors
        raise Undecodable(f"{type(error).__name__}: {error}") from error
    if not _has_end(data):  # Pillow accepts a JPEG that was cut off within its last rows, and fills them with grey
        raise Undecodable("truncated: the JPEG has no end-of-image marker")
    return pixels


def _has_end(data: bytes) -> bool:
    """Whether a JPEG has an end-of-image marker behind its first scan. True for every other format."""
    if not data.startswith(b"\xff\xd8"):
        return True
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == 0xFF:  # a fill byte
            position += 1
            continue
        if data[position + 1] == 0xDA:  # start of scan; in scan data, 0xFF is followed by 0 unless it is a marker
            break
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return data.find(b"\xff\xd9", position) >= 0


def _decode_regular_jpeg(data: bytes, short_side: int) -> np.ndarray | None:
    """Decodes a grey or YCbCr JPEG without irregularities, in a fifth less time than Pillow. None for all others."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or not _has_end(data):
            return None
        _check_size(width, height)
        divisor = _decode_divisor(width, height, short_side)
        rows, columns = -(-height // divisor), -(-width // divisor)
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns, min_factor=2)
        return pixels
    except (ValueError, KeyError):  # an error or only a warning: Pillow decides. KeyError: an unusual subsampling.
        return None


def _decode_with_pillow(data: bytes, settings: ResizeSettings) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF; sizes are checked below
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
        width, height = image.size
        _check_size(width, height)
        if image.format in ("JPEG", "MPO"):
            divisor = _decode_divisor(width, height, settings.short_side)
            try:
                image.draft(None, (width // divisor, height // divisor))
            except Exception:  # a kind of JPEG that cannot be decoded smaller: decode it whole
                image = Image.open(BytesIO(data), formats=FORMATS)
        if settings.apply_exif:
            image = _upright(image)
        return np.array(image if image.mode == "RGB" else _to_rgb(image))  # convert would copy RGB too


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation. Unlike ImageOps.exif_transpose, works although other EXIF tags are damaged."""
    image.load()  # raises errors of the image data here, outside the try block for EXIF
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION_TAG)
    except Exception:  # on damaged EXIF, parsers raise many kinds of errors; such EXIF is ignored
        return image
    return image.transpose(EXIF_TRANSPOSES[orientation]) if orientation in EXIF_TRANSPOSES else image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Undecodable(f"{width} x {height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?")


def _decode_divisor(width: int, height: int, short_side: int) -> int:
    """The largest of 8, 4, 2 and 1 by which a JPEG can be decoded smaller without changing its stored size.

    The decoded image must still be at least as large as the stored one. Decoding rounds sides up, which can change
    the rounded long side of the stored image; such divisors are rejected.
    """
    target = _stored_size(width, height, short_side)
    for divisor in (8, 4, 2):
        large_enough = width >= divisor * target[0] and height >= divisor * target[1]
        if large_enough and _stored_size(-(-width // divisor), -(-height // divisor), short_side) == target:
            return divisor
    return 1


def _stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) after resizing. The long side is rounded, as in the author's 2014 tool."""
    scale = short_side / min(width, height)
    return (short_side, round(height * scale)) if width < height else (round(width * scale), short_side)


def _to_rgb(image: Image.Image) -> Image.Image:
    # convert("RGB") would clip values at 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = getattr(image, "tag_v2", {}).get(TIFF_BITS_PER_SAMPLE, (16,))[0]
        shift = 4 if bits == 12 else 8
        return Image.fromarray((np.asarray(image) >> shift).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_scaled_by_range(np.asarray(image).astype(np.float64))).convert("RGB")
    return image.convert("RGB")


def _scaled_by_range(values: np.ndarray) -> np.ndarray:
    """Maps the smallest value to 0 and the largest to 255. Such files do not say which values are black and white."""
    low, high = values.min(), values.max()
    if not np.isfinite(high - low) or low == high:
        raise Undecodable(f"32-bit pixels from {low:g} to {high:g}, which cannot be scaled to 0 to 255")
    scaled: np.ndarray = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
    return scaled


def resize(pixels: np.ndarray, settings: ResizeSettings) -> np.ndarray:
    """Resizes to the stored short side and, for the stored shape `square`, cuts out the central square.

    Args:
        pixels: uint8 (H, W, 3).
        settings: Short side, stored shape and filter.

    Returns:
        uint8 (H, W, 3), contiguous.

    Raises:
        Undecodable: The long side would be too long for a JPEG.
    """
    height, width, _ = pixels.shape
    side = settings.short_side
    size = _stored_size(width, height, side)
    if max(size) > MAX_JPEG_SIDE:
        raise Undecodable(f"{width} x {height} pixels: at short side {side} too long for a JPEG")
    if size != (width, height):
        pixels = _scaled(pixels, size, settings.filter)
    if settings.stored == "square":
        top, left = (size[1] - side) // 2, (size[0] - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    return np.ascontiguousarray(pixels)


def _scaled(pixels: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    if filter in ("bicubic", "lanczos"):  # the same kernels as Pillow's, in a sixth of the time
        import torch  # takes most of a second, which a process that does not resize saves

        # With these strides torch sees channels_last input and gives channels_last output. From any other view it
        # gives planar output, and converting that back takes as long as the resize itself.
        nchw = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(nchw, size=size[::-1], mode=filter, antialias=True)
        return resized.permute(0, 2, 3, 1)[0].numpy()
    shrinks = size[0] < pixels.shape[1]
    kernel = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC  # as in the author's 2014 tool
    return np.asarray(Image.fromarray(pixels).resize(size, kernel))


def encode(pixels: np.ndarray, settings: ResizeSettings) -> Encoded:
    """Encodes contiguous uint8 (H, W, 3) pixels as a baseline JPEG."""
    subsampling = settings.subsampling.replace(":", "")
    jpeg = simplejpeg.encode_jpeg(pixels, settings.quality, "RGB", subsampling)
    return Encoded(jpeg, pixels.shape[1], pixels.shape[0])


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the bytes that `transcode` makes."""
    turbo = features.version("libjpeg_turbo")
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": str(turbo),
        "simplejpeg": simplejpeg.__version__,
        "torch": version("torch").partition("+")[0],
    }
