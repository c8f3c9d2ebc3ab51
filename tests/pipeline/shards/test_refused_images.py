"""Images that cannot be stored are refused with a reason, and before they take memory."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from pipeline.shards.settings import ResizeSettings
from pipeline.shards.transcode import MAX_PIXELS, Undecodable, transcode
from tests.support.image_files import encoded, photo

PLAIN = ResizeSettings()


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", b"\xff\xd8\xff\xe0 no jpeg", encoded(photo(400, 300), "JPEG")[:3000], bytes(1000)],
    ids=["empty", "gif header", "jpeg header", "truncated", "zeros"],
)
def test_what_is_no_image_is_undecodable(data: bytes):
    with pytest.raises(Undecodable, match=r"\w"):
        transcode(data, PLAIN)


def png_of_size(side: int) -> bytes:
    """A PNG whose header claims side x side pixels, with a valid checksum."""
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


# Decodes the first file of argv, then the others, which are all refused. Prints by how many kB its peak memory grew
# meanwhile. VmHWM is used because the peak of getrusage starts, in a child process, at the parent's peak.
PEAK = """
import re, sys
from pathlib import Path
from pipeline.shards.settings import ResizeSettings
from pipeline.shards.transcode import Undecodable, transcode

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
    """Files whose headers claim up to 4,290,250,000 pixels are refused with their size as the reason.

    Together they take less than 64 MB of memory; decoding any of them would take at least 400 MB."""
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


def test_the_pixel_limit_is_exact():
    """8192 x 8192 (2**26 pixels) passes the size check, then fails as truncated; 8193 x 8193 is refused."""
    side = 2**13
    assert side * side == MAX_PIXELS
    with pytest.raises(Undecodable, match="8193 x 8193 pixels, more than 67,108,864"):
        transcode(png_of_size(side + 1), PLAIN)
    with pytest.raises(Undecodable, match=r"(?i)truncated|broken"):
        transcode(png_of_size(side), PLAIN)


def test_an_image_too_long_for_a_jpeg_is_undecodable():
    with pytest.raises(Undecodable, match="too long for a JPEG"):
        transcode(encoded(Image.new("RGB", (3000, 8))), PLAIN)
