"""Irregular images: unusual formats, colour modes and EXIF are stored as they look."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.imagenet.entries import FORMATS, image_suffixes
from pipeline.shards.settings import ResizeSettings
from pipeline.shards.transcode import Undecodable, _decode_regular_jpeg, decode, transcode
from tests.support.image_files import encoded, photo

PLAIN = ResizeSettings()


def with_alpha(image: Image.Image) -> Image.Image:
    """The image with an alpha channel that falls from left to right."""
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image


def sixteen_bit(image: Image.Image) -> Image.Image:
    """16-bit grey: the image in the upper byte, other values in the lower byte."""
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    return Image.fromarray(grey << 8 | (255 - grey))


def pgm_of_16_bits(image: Image.Image) -> bytes:
    """A binary PGM with two bytes per value: the image in the upper byte."""
    values = np.asarray(image.convert("L")).astype(">u2") << 8
    return b"P5 %d %d 65535\n" % image.size + values.astype(">u2").tobytes()


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def palette(image: Image.Image) -> Image.Image:
    return image.quantize(200).convert("RGB")


def same(image: Image.Image) -> Image.Image:
    return image


# Kind of file -> (function that writes an image as such a file, function that gives the RGB image it shows).
LOSSLESS = {
    "grey PNG": (lambda image: encoded(image.convert("L")), grey),
    "16-bit grey": (lambda image: encoded(sixteen_bit(image)), grey),
    "16-bit grey TIFF": (lambda image: encoded(sixteen_bit(image), "TIFF"), grey),
    "palette": (lambda image: encoded(image.quantize(200)), palette),
    "palette with transparency": (lambda image: encoded(image.quantize(200), transparency=7), palette),
    "RGBA": (lambda image: encoded(with_alpha(image)), same),
    "LA": (lambda image: encoded(with_alpha(image.convert("L"))), grey),
    "PNG under a JPEG's name": (lambda image: encoded(image), same),
    "WebP under a JPEG's name": (lambda image: encoded(image, "WEBP", lossless=True), same),
    "WebP with alpha": (lambda image: encoded(with_alpha(image), "WEBP", lossless=True, exact=True), same),
    "GIF": (lambda image: encoded(image.quantize(200), "GIF"), palette),
    "GIF of two frames": (
        lambda image: encoded(image.quantize(200), "GIF", save_all=True, append_images=[Image.new("P", image.size)]),
        palette,
    ),
    "BMP": (lambda image: encoded(image, "BMP"), same),
    "TIFF": (lambda image: encoded(image, "TIFF"), same),
    "PPM": (lambda image: encoded(image, "PPM"), same),
    "16-bit PGM": (lambda image: pgm_of_16_bits(image), grey),
    "JPEG 2000": (lambda image: encoded(image, "JPEG2000"), same),
}
LOSSY = {
    "JPEG": (lambda image: encoded(image, "JPEG", quality=95), same),
    "grey JPEG": (lambda image: encoded(image.convert("L"), "JPEG", quality=95), grey),
    "AVIF": (lambda image: encoded(image, "AVIF", quality=95), same),
    "CMYK": (lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95), same),
    "progressive": (lambda image: encoded(image, "JPEG", quality=95, progressive=True), same),
    "JPEG coded as RGB": (lambda image: encoded(image, "JPEG", quality=95, keep_rgb=True), same),
    "MPO": (
        lambda image: encoded(image, "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", image.size)]),
        same,
    ),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_are_decoded_exactly(kind: str):
    """Lossless files decode to the original pixels. Alpha and the lower byte of 16 bits are dropped."""
    write, shown = LOSSLESS[kind]
    image = photo(320, 256)
    np.testing.assert_array_equal(decode(write(image), PLAIN), np.asarray(shown(image)), strict=True)


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_odd_images_are_stored_as_they_look(kind: str):
    """For every kind of file, the stored JPEG is RGB and shows the original image."""
    write, shown = {**LOSSLESS, **LOSSY}[kind]
    image = photo(320, 256)
    out = transcode(write(image), ResizeSettings(quality=95, subsampling="4:4:4"))
    with Image.open(io.BytesIO(out.jpeg)) as stored:
        assert (stored.format, stored.mode) == ("JPEG", "RGB")
        assert np.abs(np.asarray(stored).astype(float) - np.asarray(shown(image))).mean() < 4


@pytest.mark.parametrize("kind", ["CMYK", "JPEG coded as RGB"])
def test_colours_other_than_ycbcr_are_left_to_pillow(kind: str):
    assert _decode_regular_jpeg(LOSSY[kind][0](photo(320, 256)), PLAIN.short_side) is None


@pytest.mark.parametrize(("subsampling", "luma"), [("4:2:0", (2, 2)), ("4:2:2", (2, 1)), ("4:4:4", (1, 1))])
def test_the_stored_file_has_the_requested_subsampling(subsampling: str, luma: tuple[int, int]):
    """The frame header has the expected sampling factors of luma and both chroma planes."""
    out = transcode(encoded(photo(300, 280)), ResizeSettings(subsampling=subsampling))
    with Image.open(io.BytesIO(out.jpeg)) as image:
        assert [plane[1:3] for plane in image.layer] == [luma, (1, 1), (1, 1)]


@pytest.mark.parametrize("format", ["EPS", "PCX", "TGA", "ICO", "PDF"])
def test_other_formats_are_refused(format: str):
    with pytest.raises(Undecodable, match="not an image in a known format"):
        transcode(encoded(photo(64, 64), format), PLAIN)


def test_every_listed_suffix_is_decoded_and_no_other_is_listed():
    """A file that `entries` lists as an image is of a format that `decode` tries."""
    kinds = {Image.registered_extensions()[suffix] for suffix in image_suffixes()}
    assert kinds == {*FORMATS, "MPO"}, "the reader of MPO is that of JPEG"
    assert {".ppm", ".avif", ".jp2", ".jfif", ".mpo"} <= image_suffixes()
    assert image_suffixes().isdisjoint({".eps", ".pdf", ".tga", ".psd", ".h5"})


def test_an_image_without_bytes_has_its_own_reason():
    """A null in a parquet file, or an empty file."""
    with pytest.raises(Undecodable, match=r"^no image bytes$"):
        transcode(b"", PLAIN)


# ---- EXIF ---------------------------------------------------------------------------------------------------------


def exif_of(orientation: int) -> bytes:
    """EXIF as a camera writes it: maker, orientation, resolution."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "Camera maker", orientation, 72.0
    return exif.tobytes()


@pytest.mark.parametrize("size", [(320, 256), (1400, 1100)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotates_an_image_only_on_request(orientation: int, size: tuple[int, int]):
    """Without apply_exif, pixels are those of a file without EXIF. With it, they are those of ImageOps.exif_transpose,
    decoded at full or at reduced size. The stored file never has EXIF."""
    data = encoded(photo(*size), "JPEG", exif=exif_of(orientation))
    plain = decode(encoded(photo(*size), "JPEG"), PLAIN)
    np.testing.assert_array_equal(decode(data, PLAIN), plain, strict=True)
    upright = Image.fromarray(plain)
    upright.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(upright))
    np.testing.assert_array_equal(decode(data, ResizeSettings(apply_exif=True)), expected, strict=True)
    for apply_exif in (False, True):
        out = transcode(data, ResizeSettings(apply_exif=apply_exif))
        assert (out.width < out.height) == (apply_exif and orientation >= 5)
        with Image.open(io.BytesIO(out.jpeg)) as stored:
            assert "exif" not in stored.info


@pytest.mark.parametrize("apply_exif", [False, True])
@pytest.mark.parametrize("damage", ["other tag", "cut", "noise", "header"])
def test_damaged_exif_does_not_stop_decoding(damage: str, apply_exif: bool):
    """A readable orientation is applied although another tag is damaged; unreadable EXIF is ignored."""
    whole = exif_of(6)
    broken = {
        "other tag": whole[:41] + b"\x03" + whole[42:],  # the resolution's type; ImageOps.exif_transpose fails on it
        "cut": whole[:20],
        "noise": whole[:14] + np.random.default_rng(1).bytes(300),
        "header": whole[:6] + b"\xff" * 40,
    }[damage]
    plain = decode(encoded(photo(320, 256), "JPEG"), PLAIN)
    turned = np.rot90(plain, -1) if damage == "other tag" and apply_exif else plain
    data = encoded(photo(320, 256), "JPEG", exif=broken)
    np.testing.assert_array_equal(decode(data, ResizeSettings(apply_exif=apply_exif)), turned, strict=True)
