"""Resizing: sizes, colours and oddities, against Pillow doing the same plainly."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.resize import ResizeSettings, Undecodable, decode, transcode

PLAIN = ResizeSettings()


def photo(width: int, height: int) -> Image.Image:
    """A smooth coloured picture with some detail."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = [128 + 100 * np.sin(x / (17 + 9 * c) + y / (23 - 5 * c)) for c in range(3)]
    return Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(np.float64)


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (256, 256), (150, 200), (257, 1000), (1600, 1200)]
)
def test_the_short_side_is_256_and_the_shape_is_kept(width: int, height: int):
    out = transcode(encoded(photo(width, height)), PLAIN)
    assert min(out.width, out.height) == 256
    assert max(out.width, out.height) == round(256 * max(width, height) / min(width, height))
    assert decoded(out.jpeg).shape == (out.height, out.width, 3)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 700)])
def test_square_is_the_centre_of_short_side(width: int, height: int):
    """Stored losslessly enough, `square` shows the central 256 x 256 of `short-side`."""
    data = encoded(photo(width, height))
    fine = {"quality": 100, "subsampling": "4:4:4"}
    whole = decoded(transcode(data, ResizeSettings(**fine)).jpeg)
    square = decoded(transcode(data, ResizeSettings(stored="square", **fine)).jpeg)
    top, left = (whole.shape[0] - 256) // 2, (whole.shape[1] - 256) // 2
    assert np.abs(square - whole[top : top + 256, left : left + 256]).mean() < 1


@pytest.mark.parametrize(
    ("filter", "kernel"),
    [("bicubic", Image.Resampling.BICUBIC), ("lanczos", Image.Resampling.LANCZOS), ("area", Image.Resampling.BOX)],
)
def test_filters_are_pillows(filter: str, kernel: Image.Resampling):
    """Each filter gives, within rounding, what Pillow's kernel of that name gives."""
    image = photo(450, 360)
    ours = decoded(transcode(encoded(image), ResizeSettings(filter=filter, quality=100, subsampling="4:4:4")).jpeg)
    plain = np.asarray(image.resize((320, 256), kernel)).astype(np.float64)
    assert np.abs(ours - plain).mean() < 1


def test_the_jpeg_is_baseline_rgb_420_without_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    out = transcode(encoded(photo(400, 300), "JPEG", exif=exif, progressive=True), PLAIN)
    with Image.open(io.BytesIO(out.jpeg)) as image:
        assert (image.mode, image.format) == ("RGB", "JPEG")
        assert "progressive" not in image.info
        assert "exif" not in image.info
        assert image.layer[0][1:3] == (2, 2)  # luma sampled twice as densely as chroma, both ways
    assert (out.width, out.height) == (341, 256)  # the orientation tag is ignored


ODD = {
    "grey": lambda image: encoded(image.convert("L"), "JPEG", quality=95),
    "cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95),
    "palette": lambda image: encoded(image.quantize(256)),
    "alpha": lambda image: encoded(image.convert("RGBA")),
    "webp": lambda image: encoded(image, "WEBP", lossless=True),
    "progressive": lambda image: encoded(image, "JPEG", quality=95, progressive=True),
    "16-bit": lambda image: encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_show_what_they_show(kind: str):
    """Whatever the format, the stored picture is the one that went in (grey where it was grey)."""
    image = photo(320, 256)
    expected = image.convert("L").convert("RGB") if kind in ("grey", "16-bit") else image
    if kind == "palette":
        expected = image.quantize(256).convert("RGB")
    out = decoded(transcode(ODD[kind](image), ResizeSettings(quality=95, subsampling="4:4:4")).jpeg)
    assert np.abs(out - np.asarray(expected)).mean() < 4


def test_a_jpeg_much_larger_than_needed_is_decoded_smaller():
    """Decoding at a fraction is still at least as large as needed, and shows the same picture."""
    image = photo(1400, 1100)
    small = decode(encoded(image, "JPEG", quality=95), 256)
    assert small.shape == (275, 350, 3)
    full = np.asarray(image.resize((350, 275), Image.Resampling.BOX))
    assert np.abs(small.astype(float) - full).mean() < 2


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", b"\xff\xd8\xff\xe0 no jpeg", encoded(photo(400, 300), "JPEG")[:3000], bytes(1000)],
    ids=["empty", "gif header", "jpeg header", "truncated", "zeros"],
)
def test_what_is_no_picture_is_undecodable(data: bytes):
    with pytest.raises(Undecodable, match=r"\w"):
        transcode(data, PLAIN)


def test_a_decompression_bomb_is_not_decoded():
    """A PNG header that promises 40,000 x 40,000 pixels is refused before any is decoded."""
    data = bytearray(encoded(photo(16, 16)))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(Undecodable, match="DecompressionBombError"):
        transcode(bytes(data), PLAIN)


def test_a_ribbon_too_long_for_a_jpeg_is_undecodable():
    with pytest.raises(Undecodable, match="too long for a JPEG"):
        transcode(encoded(Image.new("RGB", (3000, 8))), PLAIN)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quality": 0}, "quality 0"),
        ({"stored": "round"}, "'round'"),
        ({"filter": "x"}, "'x'"),
        ({"subsampling": "4"}, "'4'"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ResizeSettings(**wrong)
