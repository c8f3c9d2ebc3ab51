"""Resizing: sizes, colours and oddities, against Pillow doing the same plainly."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.shards.transcode import (
    MAX_PIXELS,
    ResizeSettings,
    Undecodable,
    _by_pillow,
    _plain_jpeg,
    decode,
    resize,
    transcode,
)
from tools.bench_resize import lanczos_reference

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
    ours = resize(np.array(image), ResizeSettings(filter=filter)).astype(int)
    apart = np.abs(ours - np.asarray(image.resize((320, 256), kernel)))
    assert apart.max() <= 2
    assert apart.mean() < 0.02


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


# ---- the quick road -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4", "grey"])
@pytest.mark.parametrize(
    "size", [(500, 375), (1400, 1100), (600, 2100), (257, 256), (1023, 2047), (2049, 2051), (99, 80)]
)
def test_the_quick_road_gives_pillows_pixels_bit_for_bit(size: tuple[int, int], subsampling: str):
    """Whole or at a fraction of its size, at even and odd sides, baseline and progressive: one libjpeg, one picture."""
    image = photo(*size)
    coding = {"subsampling": subsampling} if subsampling != "grey" else {}
    for progressive in (False, True):
        data = encoded(image if coding else image.convert("L"), "JPEG", progressive=progressive, **coding)
        quick = _plain_jpeg(data, PLAIN.short_side)
        assert quick is not None
        np.testing.assert_array_equal(quick, _by_pillow(data, PLAIN), strict=True)


def test_a_jpeg_much_larger_than_needed_is_decoded_smaller():
    """Decoding at a fraction is still at least as large as needed, and shows the same picture."""
    image = photo(1400, 1100)
    small = decode(encoded(image, "JPEG", quality=95), PLAIN)
    assert small.shape == (275, 350, 3)
    full = np.asarray(image.resize((350, 275), Image.Resampling.BOX))
    assert np.abs(small.astype(float) - full).mean() < 2


@pytest.mark.parametrize("size", [(1024, 683), (1121, 1790), (775, 1586), (577, 2767), (2049, 1537), (4101, 3077)])
def test_decoding_smaller_does_not_change_the_stored_size(size: tuple[int, int]):
    """A JPEG decoded at a fraction, where a side that does not divide is rounded up, is stored no pixel longer or
    shorter than the same picture decoded whole."""
    image = Image.new("RGB", size)
    from_jpeg, from_png = transcode(encoded(image, "JPEG"), PLAIN), transcode(encoded(image), PLAIN)
    assert (from_jpeg.width, from_jpeg.height) == (from_png.width, from_png.height)


def test_the_reference_is_pillows_lanczos():
    """The benchmark's float64 reference against Pillow's own in float32, shrinking and growing, plane by plane."""
    for size, wanted in [((500, 375), (341, 256)), ((1400, 1100), (326, 256)), ((150, 200), (256, 341))]:
        picture = np.asarray(photo(*size))
        reference = lanczos_reference(picture, wanted)
        for plane in range(3):
            plain = Image.fromarray(picture[..., plane].astype(np.float32)).resize(wanted, Image.Resampling.LANCZOS)
            np.testing.assert_allclose(reference[..., plane], np.asarray(plain), rtol=0, atol=1e-3)


# ---- oddities -----------------------------------------------------------------------------------------------------


def with_alpha(image: Image.Image) -> Image.Image:
    """The picture, ever less opaque from left to right."""
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image


def sixteen_bit(image: Image.Image) -> Image.Image:
    """The grey picture in the upper byte, something else in the lower."""
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    return Image.fromarray(grey << 8 | (255 - grey))


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def palette(image: Image.Image) -> Image.Image:
    return image.quantize(200).convert("RGB")


def same(image: Image.Image) -> Image.Image:
    return image


# What it is called: how the picture is written, and which picture that shows.
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
}
LOSSY = {
    "JPEG": (lambda image: encoded(image, "JPEG", quality=95), same),
    "grey JPEG": (lambda image: encoded(image.convert("L"), "JPEG", quality=95), grey),
    "CMYK": (lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95), same),
    "progressive": (lambda image: encoded(image, "JPEG", quality=95, progressive=True), same),
    "JPEG coded as RGB": (lambda image: encoded(image, "JPEG", quality=95, keep_rgb=True), same),
    "MPO": (
        lambda image: encoded(image, "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", image.size)]),
        same,
    ),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_odd_formats_are_read_to_the_bit(kind: str):
    """What loses nothing is decoded to the pixels that went in: alpha and the lower byte of 16 bits are dropped."""
    write, shown = LOSSLESS[kind]
    image = photo(320, 256)
    np.testing.assert_array_equal(decode(write(image), PLAIN), np.asarray(shown(image)), strict=True)


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_odd_pictures_are_stored_as_they_look(kind: str):
    """Whatever the format, the stored JPEG is RGB and shows the picture that went in (grey where it was grey)."""
    write, shown = {**LOSSLESS, **LOSSY}[kind]
    image = photo(320, 256)
    out = transcode(write(image), ResizeSettings(quality=95, subsampling="4:4:4"))
    with Image.open(io.BytesIO(out.jpeg)) as stored:
        assert (stored.format, stored.mode) == ("JPEG", "RGB")
        assert np.abs(np.asarray(stored).astype(float) - np.asarray(shown(image))).mean() < 4


@pytest.mark.parametrize("kind", ["CMYK", "JPEG coded as RGB"])
def test_colours_other_than_ycbcr_are_left_to_pillow(kind: str):
    assert _plain_jpeg(LOSSY[kind][0](photo(320, 256)), PLAIN.short_side) is None


@pytest.mark.parametrize(("subsampling", "luma"), [("4:2:0", (2, 2)), ("4:2:2", (2, 1)), ("4:4:4", (1, 1))])
def test_the_subsampling_asked_for_is_in_the_file(subsampling: str, luma: tuple[int, int]):
    """The frame header's sampling factors, of luma and of both chroma planes."""
    out = transcode(encoded(photo(300, 280)), ResizeSettings(subsampling=subsampling))
    with Image.open(io.BytesIO(out.jpeg)) as image:
        assert [plane[1:3] for plane in image.layer] == [luma, (1, 1), (1, 1)]


@pytest.mark.parametrize("format", ["EPS", "PPM", "PCX", "TGA", "ICO", "PDF"])
def test_formats_beyond_ours_are_refused(format: str):
    with pytest.raises(Undecodable, match="no picture in a known format"):
        transcode(encoded(photo(64, 64), format), PLAIN)


# ---- EXIF ---------------------------------------------------------------------------------------------------------


def exif_of(orientation: int) -> bytes:
    """A camera's EXIF: maker, orientation, resolution."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "Camera maker", orientation, 72.0
    return exif.tobytes()


@pytest.mark.parametrize("size", [(320, 256), (1400, 1100)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_only_when_asked(orientation: int, size: tuple[int, int]):
    """Ignored: the very pixels without EXIF. Applied: what ImageOps.exif_transpose makes of it, whole or decoded
    at a fraction. Never in the stored file."""
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
def test_a_damaged_exif_costs_no_picture(damage: str, apply_exif: bool):
    """An orientation that can still be read counts, though another tag is damaged; what cannot be read says nothing."""
    whole = exif_of(6)
    broken = {
        "other tag": whole[:41] + b"\x03" + whole[42:],  # the resolution's type: ImageOps.exif_transpose fails on it
        "cut": whole[:20],
        "noise": whole[:14] + np.random.default_rng(1).bytes(300),
        "header": whole[:6] + b"\xff" * 40,
    }[damage]
    plain = decode(encoded(photo(320, 256), "JPEG"), PLAIN)
    turned = np.rot90(plain, -1) if damage == "other tag" and apply_exif else plain
    data = encoded(photo(320, 256), "JPEG", exif=broken)
    np.testing.assert_array_equal(decode(data, ResizeSettings(apply_exif=apply_exif)), turned, strict=True)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", b"\xff\xd8\xff\xe0 no jpeg", encoded(photo(400, 300), "JPEG")[:3000], bytes(1000)],
    ids=["empty", "gif header", "jpeg header", "truncated", "zeros"],
)
def test_what_is_no_picture_is_undecodable(data: bytes):
    with pytest.raises(Undecodable, match=r"\w"):
        transcode(data, PLAIN)


def png_of_size(side: int) -> bytes:
    """A PNG whose header, with a right checksum, promises side x side pixels."""
    data = bytearray(encoded(photo(16, 16)))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def jpeg_of_size(side: int) -> bytes:
    data = bytearray(encoded(photo(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = side.to_bytes(2, "big") * 2
    return bytes(data)


def gif_of_size(side: int) -> bytes:
    data = bytearray(encoded(photo(16, 16), "GIF"))
    data[6:10] = side.to_bytes(2, "little") * 2
    return bytes(data)


def webp_of_size(side: int) -> bytes:
    data = bytearray(encoded(photo(16, 16), "WEBP"))
    data[26:30] = side.to_bytes(2, "little") * 2
    return bytes(data)


# Decodes a small picture, then the others of argv, which are all refused; prints by how many kB its peak memory grew
# meanwhile. (The peak that getrusage gives would not do: a child's begins at its parent's.)
PEAK = """
import re, sys
from pathlib import Path
from pipeline.shards.transcode import ResizeSettings, Undecodable, transcode

def peak_kb():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

small, *bombs = (Path(name).read_bytes() for name in sys.argv[1:])
transcode(small, ResizeSettings())
before = peak_kb()
for bomb in bombs:
    try:
        transcode(bomb, ResizeSettings())
    except Undecodable:
        continue
    sys.exit("a bomb was decoded")
print(peak_kb() - before)
"""


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path: Path):
    """Headers that promise up to 4,290,250,000 pixels: each is refused with its size as the reason, and all together
    take less than 64 MB; any of them decoded would take 400 MB and more."""
    bombs = [
        png_of_size(40_000),
        png_of_size(12_000),
        jpeg_of_size(65_500),
        jpeg_of_size(12_000),
        gif_of_size(65_500),
        webp_of_size(16_383),
    ]
    files = []
    for number, bomb in enumerate([encoded(photo(320, 280), "JPEG"), *bombs]):
        files.append(tmp_path / f"{number}")
        files[-1].write_bytes(bomb)
    for bomb in bombs:
        with pytest.raises(Undecodable, match="decompression bomb"):
            transcode(bomb, PLAIN)
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", PEAK, *files], cwd=root, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 64_000


def test_the_limit_of_pixels_is_where_it_is_said_to_be():
    """8192 x 8192 is 2**26 pixels; a row more is refused."""
    side = 2**13
    assert side * side == MAX_PIXELS
    with pytest.raises(Undecodable, match="8193 x 8193 pixels, more than 67,108,864"):
        transcode(png_of_size(side + 1), PLAIN)
    with pytest.raises(Undecodable, match=r"(?i)truncated|broken"):
        transcode(png_of_size(side), PLAIN)


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
