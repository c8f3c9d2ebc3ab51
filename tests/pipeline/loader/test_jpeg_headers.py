"""The header check: stored images pass, every kind of broken header is named, and nothing outside the data is read."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.loader.jpeg_headers import FAULTS, header_faults
from pipeline.shards.reader import ShardSet

WIDTH, HEIGHT = 48, 32
Bytes = NDArray[np.uint8]
OPTIONS = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}]


def encoded(mode: str = "RGB", **options: object) -> Bytes:
    """A JPEG of 48 x 32 pixels."""
    pixels = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def fault(jpeg: Bytes, width: int = WIDTH, height: int = HEIGHT) -> str:
    """The fault that the check names."""
    jpeg = np.ascontiguousarray(jpeg)
    codes = header_faults(*(np.array([v]) for v in (jpeg.ctypes.data, len(jpeg), width, height)))
    return FAULTS[codes[0]]


def segment(jpeg: Bytes, marker: int) -> int:
    """Where the first segment with `marker` starts."""
    return jpeg.tobytes().index(bytes([0xFF, marker]))


def test_stored_images_are_intact(train_shards: ShardSet):
    jpegs, rows = train_shards.jpegs(np.arange(len(train_shards))), train_shards.index
    addresses = np.array([jpeg.ctypes.data for jpeg in jpegs])
    assert not header_faults(addresses, rows["size"], rows["width"], rows["height"]).any()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_pillow_writes_is_intact(mode: str, options: dict[str, object]):
    assert fault(encoded(mode, **options)) == "intact"


def overwritten(start: int, values: list[int]) -> Callable[[Bytes], Bytes]:
    """Overwrites bytes from `start`."""

    def damage(jpeg: Bytes) -> Bytes:
        jpeg[start : start + len(values)] = values
        return jpeg

    return damage


def in_segment(marker: int, offset: int, value: int) -> Callable[[Bytes], Bytes]:
    """Overwrites one byte, `offset` bytes after the marker's own two."""

    def damage(jpeg: Bytes) -> Bytes:
        jpeg[segment(jpeg, marker) + 2 + offset] = value
        return jpeg

    return damage


def without(marker: int) -> Callable[[Bytes], Bytes]:
    """Cuts out the first segment with `marker`."""

    def damage(jpeg: Bytes) -> Bytes:
        start = segment(jpeg, marker)
        length = 2 + int(jpeg[start + 2]) * 256 + int(jpeg[start + 3])
        return np.delete(jpeg, slice(start, start + length))

    return damage


DAMAGES = {
    "zeros": (lambda jpeg: jpeg * 0, "it does not start as a JPEG"),
    "text": (lambda jpeg: np.frombuffer(b"not an image" * 40, np.uint8), "it does not start as a JPEG"),
    "start and zeros": (lambda jpeg: np.concatenate([jpeg[:2], 0 * jpeg]), "a marker is missing where one is expected"),
    "two bytes": (lambda jpeg: jpeg[:2], "it does not start as a JPEG"),
    "cut in the header": (lambda jpeg: jpeg[:100], "a header segment is longer than the data"),
    "no scan": (lambda jpeg: jpeg[: segment(jpeg, 0xDA)], "a marker is missing where one is expected"),
    "no image data": (lambda jpeg: jpeg[: segment(jpeg, 0xDA) + 14], "the image data are missing"),
    "cut in the scan": (lambda jpeg: jpeg[:-9], "the end of the image is missing"),
    "quantisation table 9": (in_segment(0xDB, 2, 9), "a quantisation table is malformed"),
    "no quantisation table": (without(0xDB), "the scan refers to a table that is missing"),
    "Huffman class 2": (in_segment(0xC4, 2, 0x20), "a Huffman table is malformed"),
    "too many Huffman codes": (in_segment(0xC4, 3, 3), "a Huffman table is malformed"),
    "no Huffman table": (without(0xC4), "the scan refers to a table that is missing"),
    "12 bits": (in_segment(0xC0, 2, 12), "the frame header is malformed"),
    "other height": (in_segment(0xC0, 4, HEIGHT + 1), "its width or height differs from index.npy"),
    "4 components": (in_segment(0xC0, 7, 4), "the frame header is malformed"),
    "sampling 0": (in_segment(0xC0, 9, 0), "the frame header is malformed"),
    "arithmetic coding": (in_segment(0xC0, -1, 0xC9), "the frame type is not baseline or progressive Huffman"),
    "no frame": (without(0xC0), "the scan header is malformed"),
    "scan of a component that is not there": (in_segment(0xDA, 3, 77), "the scan header is malformed"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_header_is_named(name: str):
    damage, expected = DAMAGES[name]
    assert fault(damage(encoded())) == expected


def test_an_image_of_another_size_than_the_index_states_is_named():
    assert fault(encoded(), width=WIDTH + 1) == "its width or height differs from index.npy"


def test_nothing_behind_the_data_is_read():
    """The page behind the data may not be read: doing so would end this process with a segmentation fault."""
    jpeg, page = encoded(), mmap.PAGESIZE
    pages = -(-len(jpeg) // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    whole = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    guard = whole.ctypes.data + pages * page
    assert libc.mprotect(guard, page, 0) == 0
    try:
        for length in range(1, len(jpeg) + 1, 7):
            data = whole[pages * page - length : pages * page]
            data[:] = jpeg[:length]
            assert fault(data) in FAULTS
    finally:
        libc.mprotect(guard, page, mmap.PROT_READ | mmap.PROT_WRITE)
