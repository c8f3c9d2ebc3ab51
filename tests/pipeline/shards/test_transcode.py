"""Transcoding: stored size, filters, JPEG format and the fast decoder, against Pillow as the plain reference."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.shards.settings import ResizeSettings
from pipeline.shards.transcode import _decode_regular_jpeg, _decode_with_pillow, decode, resize, transcode
from tests.support.image_files import encoded, photo
from tools.shared.resize_benchmark import lanczos_reference

PLAIN = ResizeSettings()


def decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(np.float64)


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (256, 256), (150, 200), (257, 1000), (1600, 1200)]
)
def test_the_short_side_is_256_and_the_aspect_ratio_is_kept(width: int, height: int):
    out = transcode(encoded(photo(width, height)), PLAIN)
    assert min(out.width, out.height) == 256
    assert max(out.width, out.height) == round(256 * max(width, height) / min(width, height))
    assert decoded(out.jpeg).shape == (out.height, out.width, 3)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 700)])
def test_square_is_the_centre_of_short_side(width: int, height: int):
    """At the highest JPEG quality, `square` shows the central 256 x 256 of `short-side`."""
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
    """Each filter gives the result of Pillow's kernel of that name, within rounding."""
    image = photo(450, 360)
    ours = resize(np.array(image), ResizeSettings(filter=filter)).astype(int)
    difference = np.abs(ours - np.asarray(image.resize((320, 256), kernel)))
    assert difference.max() <= 2
    assert difference.mean() < 0.02


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


# ---- the fast decoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4", "grey"])
@pytest.mark.parametrize(
    "size", [(500, 375), (1400, 1100), (600, 2100), (257, 256), (1023, 2047), (2049, 2051), (99, 80)]
)
def test_the_fast_decoder_gives_pillows_pixels_bit_for_bit(size: tuple[int, int], subsampling: str):
    """Holds at full and reduced size, for even and odd sides, for baseline and progressive JPEGs."""
    image = photo(*size)
    coding = {"subsampling": subsampling} if subsampling != "grey" else {}
    for progressive in (False, True):
        data = encoded(image if coding else image.convert("L"), "JPEG", progressive=progressive, **coding)
        fast = _decode_regular_jpeg(data, PLAIN.short_side)
        assert fast is not None
        np.testing.assert_array_equal(fast, _decode_with_pillow(data, PLAIN), strict=True)


def test_a_jpeg_much_larger_than_needed_is_decoded_smaller():
    """It is decoded at a reduced size that is still large enough, and shows the same image."""
    image = photo(1400, 1100)
    small = decode(encoded(image, "JPEG", quality=95), PLAIN)
    assert small.shape == (275, 350, 3)
    full = np.asarray(image.resize((350, 275), Image.Resampling.BOX))
    assert np.abs(small.astype(float) - full).mean() < 2


@pytest.mark.parametrize("size", [(1024, 683), (1121, 1790), (775, 1586), (577, 2767), (2049, 1537), (4101, 3077)])
def test_decoding_smaller_does_not_change_the_stored_size(size: tuple[int, int]):
    """Decoding at reduced size rounds sides up. The stored size is nevertheless that of the image decoded whole."""
    image = Image.new("RGB", size)
    from_jpeg, from_png = transcode(encoded(image, "JPEG"), PLAIN), transcode(encoded(image), PLAIN)
    assert (from_jpeg.width, from_jpeg.height) == (from_png.width, from_png.height)


def test_the_reference_is_pillows_lanczos():
    """The benchmark's float64 reference equals Pillow's float32 result, shrinking and growing, plane by plane."""
    for size, target in [((500, 375), (341, 256)), ((1400, 1100), (326, 256)), ((150, 200), (256, 341))]:
        pixels = np.asarray(photo(*size))
        reference = lanczos_reference(pixels, target)
        for plane in range(3):
            plain = Image.fromarray(pixels[..., plane].astype(np.float32)).resize(target, Image.Resampling.LANCZOS)
            np.testing.assert_allclose(reference[..., plane], np.asarray(plain), rtol=0, atol=1e-3)
