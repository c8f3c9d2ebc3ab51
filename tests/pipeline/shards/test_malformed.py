"""Malformed files: each is stored as Pillow reads it, or refused with a reason, and none stops a worker."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.imagenet.source import open_source
from pipeline.shards.build import make_split
from pipeline.shards.format import Manifest
from pipeline.shards.settings import ResizeSettings, ShardSettings
from pipeline.shards.transcode import (
    Encoded,
    Undecodable,
    _decode_regular_jpeg,
    _decode_with_pillow,
    encode,
    resize,
    transcode,
)
from pipeline.workers import ignore, workers_of
from tests.support.shard_fixtures import drawn_jpeg

PLAIN = ResizeSettings()
SOF, DHT, EOI, SOS, DQT, APP0 = 0xC0, 0xC4, 0xD9, 0xDA, 0xDB, 0xE0  # baseline JPEG's markers


# ---- the corpus ---------------------------------------------------------------------------------------------------


def encoded(format: str, **options: object) -> bytes:
    """A small image in `format`."""
    out = BytesIO()
    with Image.open(BytesIO(drawn_jpeg(1, 290, 270))) as image:
        image.save(out, format, **options)
    return out.getvalue()


JPEG = encoded("JPEG", quality=85)
WHOLE = {
    "jpeg": JPEG,
    "progressive": encoded("JPEG", progressive=True),
    "restarts": encoded("JPEG", restart_marker_rows=1, subsampling="4:4:4"),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "lossless-webp": encoded("WEBP", lossless=True),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "lzw-tiff": encoded("TIFF", compression="tiff_lzw"),
}


def truncated() -> Iterator[tuple[str, bytes]]:
    """Each kind, cut off at several lengths."""
    for kind, data in WHOLE.items():
        for length in np.linspace(3, len(data) - 1, 10 if data.startswith(b"\xff\xd8") else 5).astype(int):
            yield f"{kind}-cut-at-{length}", data[:length]


def flipped(seed: int) -> Iterator[tuple[str, bytes]]:
    """Each kind with 1 to 8 flipped bits: anywhere, or within the first 600 bytes, which hold the tables."""
    rng = np.random.default_rng(seed)
    for kind, data in WHOLE.items():
        for number in range(10):
            within = len(data) if number % 2 else 600
            damaged = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(0, within, rng.integers(1, 9))
            damaged[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
            yield f"{kind}-flipped-{number}", damaged.tobytes()


def segments(marker: int) -> list[tuple[int, int]]:
    """(start, end) of JPEG's segments with this marker, up to its scan; a segment starts with 0xff."""
    found, start = [], 2
    while True:
        end = start + 2 + int.from_bytes(JPEG[start + 2 : start + 4], "big")
        if JPEG[start + 1] == marker:
            found.append((start, end))
        if JPEG[start + 1] == SOS:
            return found
        start = end


def without(marker: int) -> bytes:
    """JPEG without its segments with this marker."""
    data = JPEG
    for start, end in reversed(segments(marker)):
        data = data[:start] + data[end:]
    return data


def put(data: bytes, place: int, new: bytes) -> bytes:
    """`data`, overwritten with `new` at `place`."""
    return data[:place] + new + data[place + len(new) :]


def tables_overwritten() -> Iterator[tuple[str, bytes]]:
    """Huffman and quantisation tables with other content. The first byte after the length is the table's number."""
    rng = np.random.default_rng(3)
    for name, marker in (("huffman", DHT), ("quantisation", DQT)):
        for number, (start, end) in enumerate(segments(marker)):
            size = end - start - 5
            for filling, new in (("zeros", bytes(size)), ("ones", b"\xff" * size), ("noise", rng.bytes(size))):
                yield f"{name}-{number}-{filling}", put(JPEG, start + 5, new)
            yield f"{name}-{number}-numbered-15", put(JPEG, start + 4, b"\xff")
            yield f"{name}-{number}-length-0", put(JPEG, start + 2, bytes(2))
            yield f"{name}-{number}-length-65535", put(JPEG, start + 2, b"\xff\xff")
        yield f"{name}-missing", without(marker)


def false_headers() -> Iterator[tuple[str, bytes]]:
    """Headers whose size, components, sampling or checksum is wrong."""
    ((frame, _),) = segments(SOF)
    ((scan, _),) = segments(SOS)
    for name, height, width in [
        ("twice-as-high", 540, 290),
        ("half-as-high", 135, 290),
        ("twice-as-wide", 270, 580),
        ("half-as-wide", 270, 145),
        ("height-0", 0, 290),
        ("width-0", 270, 0),
        ("one-pixel", 1, 1),
        ("huge", 65_500, 65_500),
        ("long", 65_500, 100),
    ]:
        yield f"jpeg-{name}", put(JPEG, frame + 5, height.to_bytes(2, "big") + width.to_bytes(2, "big"))
    for count in (0, 1, 2, 4, 255):
        yield f"jpeg-{count}-components-in-frame", put(JPEG, frame + 9, bytes([count]))
        yield f"jpeg-{count}-components-in-scan", put(JPEG, scan + 4, bytes([count]))
    for sampling in (0x00, 0x11, 0x14, 0x41, 0x44, 0xFF):
        yield f"jpeg-sampling-{sampling:02x}", put(JPEG, frame + 11, bytes([sampling]))
    for marker in (0xC2, 0xC3, 0xC5, 0xC9):
        yield f"jpeg-frame-of-kind-{marker:02x}", put(JPEG, frame + 1, bytes([marker]))
    yield "jpeg-12-bits", put(JPEG, frame + 4, b"\x0c")
    png, webp, gif = WHOLE["png"], WHOLE["webp"], WHOLE["gif"]
    yield "png-huge", put(png, 16, (40_000).to_bytes(4, "big") * 2)
    yield "png-size-0", put(png, 16, bytes(8))
    yield "png-wrong-checksum", put(png, 29, bytes(4))
    yield "png-colour-type-5", put(png, 25, b"\x05")
    yield "webp-riff-size-0", put(webp, 4, bytes(4))
    yield "webp-wider", put(webp, 26, (290 * 2).to_bytes(2, "little"))
    yield "gif-larger-screen", put(gif, 6, b"\xff\x7f\xff\x7f")
    yield "gif-screen-0", put(gif, 6, bytes(4))
    yield "bmp-huge", put(WHOLE["bmp"], 18, (2**31 - 1).to_bytes(4, "little") * 2)
    yield "tiff-directory-nowhere", put(WHOLE["tiff"], 4, b"\xff\xff\xff\x7f")
    yield "tiff-directory-in-header", put(WHOLE["tiff"], 4, bytes(4))


def combined() -> Iterator[tuple[str, bytes]]:
    """Files joined, mixed, or with parts missing."""
    for kind, data in WHOLE.items():
        yield f"{kind}-twice", data * 2
        yield f"{kind}-and-garbage", data + bytes(range(256)) * 4
        yield f"garbage-and-{kind}", b"\r\n" + data
        yield f"{kind}-wrong-magic", b"\x00\x01\x02\x03" + data[4:]
        yield f"{kind}-zeros-inside", put(data, len(data) // 2, bytes(len(data) // 8))
    yield "jpeg-and-png", JPEG + WHOLE["png"]
    yield "png-header-on-jpeg", WHOLE["png"][:33] + JPEG
    yield "jpeg-header-on-png", JPEG[:20] + WHOLE["png"]
    ((scan, scan_end),) = segments(SOS)
    yield "jpeg-no-scan", without(SOS)
    yield "jpeg-no-scan-nor-data", JPEG[:scan] + JPEG[-2:]
    yield "jpeg-no-data", JPEG[:scan_end] + JPEG[-2:]
    yield "jpeg-no-frame", without(SOF)
    yield "jpeg-no-jfif", without(APP0)
    yield "jpeg-no-end", JPEG[:-2]
    yield "jpeg-ends-early", JPEG[: len(JPEG) // 2] + bytes([0xFF, EOI])
    yield "jpeg-stray-marker", put(JPEG, (scan_end + len(JPEG)) // 2, b"\xff\xd3")
    yield "jpeg-two-frames", JPEG[: segments(SOF)[0][1]] + JPEG[segments(SOF)[0][0] :]


NOT_AN_IMAGE = {
    "empty": b"",
    "one-byte": b"\xff",
    "zeros": bytes(10_000),
    "noise": np.random.default_rng(4).bytes(10_000),
    "text": b"n00000001 is not available\n" * 40,
    "html": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="300" height="300"><rect width="9" height="9"/></svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\nshowpage\n",
    "pdf": encoded("PDF"),
    "pcx": encoded("PCX"),
    "only-soi": b"\xff\xd8",
    "soi-eoi": b"\xff\xd8\xff\xd9",
    "png-signature": b"\x89PNG\r\n\x1a\n",
    "gif-signature": b"GIF89a",
    "riff": b"RIFF\x00\x00\x00\x00WEBP",
    "tiff-signature": b"II*\x00",
    "bmp-signature": b"BM",
}

CORPUS = dict(
    (
        *NOT_AN_IMAGE.items(),
        *truncated(),
        *flipped(seed=5),
        *tables_overwritten(),
        *false_headers(),
        *combined(),
    )
)


# ---- one file at a time -------------------------------------------------------------------------------------------


def ours(data: bytes) -> Encoded | str:
    """The result of `transcode`, or the reason why it refuses the bytes."""
    try:
        return transcode(data, PLAIN)
    except Undecodable as error:
        return str(error)


def by_pillow(data: bytes) -> Encoded | None:
    """The plain reference: always decoded by Pillow; None on any error."""
    try:
        return encode(resize(_decode_with_pillow(data, PLAIN), PLAIN), PLAIN)
    except Exception:
        return None


@pytest.mark.parametrize("name", CORPUS)
def test_a_damaged_file_is_stored_as_pillow_reads_it_or_refused_with_a_reason(name: str):
    """Only Undecodable is raised, exactly if the reference fails too. Its text has words and is the same each time."""
    result = ours(CORPUS[name])
    if isinstance(result, Encoded):
        assert result == by_pillow(CORPUS[name])
    else:
        assert by_pillow(CORPUS[name]) is None
        assert re.search(r"[A-Za-z]{2}", result)
        assert result == ours(bytes(bytearray(CORPUS[name])))


def test_the_corpus_reaches_every_outcome():
    """The test above proves little unless many files are refused, many stored, and some decoded by the fast decoder."""
    results = {name: ours(data) for name, data in CORPUS.items()}
    stored = [name for name, result in results.items() if isinstance(result, Encoded)]
    fast = [name for name in stored if _decode_regular_jpeg(CORPUS[name], PLAIN.short_side) is not None]
    assert len(CORPUS) >= 200
    assert len(CORPUS) - len(stored) >= 60
    assert len(stored) - len(fast) >= 60
    assert len(fast) >= 10
    assert all(isinstance(results[name], str) for name in NOT_AN_IMAGE)


# ---- all at once --------------------------------------------------------------------------------------------------


def make_shards(source: Path, out: Path) -> Manifest:
    """Writes the training split of `source` to `out`/train with two workers."""
    with workers_of(2, "pipeline.shards.job") as workers:
        settings = ShardSettings(PLAIN, shard_samples=60)
        return make_split(open_source(source).listing("train"), out, settings, workers, len(CORPUS), ignore).manifest


def test_no_damaged_file_is_lost_or_stops_a_worker(tmp_path: Path):
    """Every file of the corpus, given a JPEG's file name, is in the shard set as `transcode` stores it, or it is in the
    manifest's quarantine with the reason that `transcode` gives."""
    folder = tmp_path / "source" / "train" / "n00000001"
    folder.mkdir(parents=True)
    for name, data in CORPUS.items():
        (folder / f"{name}.JPEG").write_bytes(data)
    manifest = make_shards(tmp_path / "source", tmp_path / "shards")
    found: dict[str, bytes | str] = {entry.key: entry.reason for entry in manifest.quarantined}
    for record in manifest.shards:
        with tarfile.open(tmp_path / "shards" / "train" / record.name) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix == "jpg":
                    assert key not in found
                    found[key] = tar.extractfile(member).read()
    results = {name: ours(data) for name, data in CORPUS.items()}
    assert found == {name: r.jpeg if isinstance(r, Encoded) else r for name, r in results.items()}
    assert manifest.samples + len(manifest.quarantined) == len(CORPUS)
