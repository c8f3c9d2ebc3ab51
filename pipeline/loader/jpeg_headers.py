"""Checks the structure of encoded JPEGs before a native decoder reads them.

DALI's CPU decoder can end the process with a segmentation fault if it cannot parse a JPEG's header (zeros, text, a cut
table). It never does if the header is intact, however damaged the entropy-coded scan is. So every image passes
`header_faults` before its bytes reach DALI. The walk reads the header and the last two bytes, not the scan, and takes
about a microsecond per image; it is compiled and releases Python's global lock.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import address_as_void_pointer, njit

FAULTS = (
    "intact",
    "it does not start as a JPEG",
    "a marker is missing where one is expected",
    "a header segment is longer than the data",
    "a quantisation table is malformed",
    "a Huffman table is malformed",
    "the frame header is malformed",
    "its width or height differs from index.npy",
    "the frame type is not baseline or progressive Huffman",
    "the scan header is malformed",
    "the scan refers to a table that is missing",
    "the image data are missing",
    "the end of the image is missing",
)
"""What `header_faults` means by each code."""
(
    _INTACT,
    _NO_START,
    _NO_MARKER,
    _TOO_LONG,
    _BAD_QUANTISATION,
    _BAD_HUFFMAN,
    _BAD_FRAME,
    _OTHER_SIZE,
    _OTHER_TYPE,
    _BAD_SCAN,
    _NO_TABLE,
    _NO_DATA,
    _NO_END,
) = (np.int64(code) for code in range(len(FAULTS)))

_SOI, _EOI, _SOS, _DQT, _DHT, _DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
_SOF0, _SOF2, _SOF_LAST, _JPG, _DAC = 0xC0, 0xC2, 0xCF, 0xC8, 0xCC

Bytes = NDArray[np.uint8]
Integers = NDArray[np.integer]


@njit("i8(u1[::1], i8, i8, u1[::1])", nogil=True)
def _quantisation_fault(data: Bytes, start: np.int64, end: np.int64, defined: Bytes) -> np.int64:
    """Checks the tables of a DQT segment, bytes `start` to `end`; sets bit 0 of `defined[id]`."""
    while start < end:
        precision, table = data[start] >> 4, data[start] & 15
        length = 1 + 64 * (1 + precision)
        if precision > 1 or table > 3 or start + length > end:
            return _BAD_QUANTISATION
        defined[table] |= 1
        start += length
    return _INTACT


@njit("i8(u1[::1], i8, i8, u1[::1])", nogil=True)
def _huffman_fault(data: Bytes, start: np.int64, end: np.int64, defined: Bytes) -> np.int64:
    """Checks the tables of a DHT segment; sets bit 1 (DC) or bit 2 (AC) of `defined[id]`."""
    while start < end:
        kind, table = data[start] >> 4, data[start] & 15
        if kind > 1 or table > 3 or start + 17 > end:
            return _BAD_HUFFMAN
        symbols, codes_left = np.int64(0), np.int64(1)
        for length in range(1, 17):
            count = np.int64(data[start + length])
            symbols += count
            codes_left = 2 * codes_left - count
            if codes_left < 0:  # more codes of this length than there are bit patterns
                return _BAD_HUFFMAN
        if symbols > 256 or start + 17 + symbols > end:
            return _BAD_HUFFMAN
        defined[table] |= 2 << kind
        start += 17 + symbols
    return _INTACT


@njit("i8(u1[::1], i8, i8, i8, i8)", nogil=True)
def _frame_fault(data: Bytes, start: np.int64, end: np.int64, width: np.int64, height: np.int64) -> np.int64:
    """Checks a SOF segment: 8 bits, 1 or 3 components, sampling factors 1 to 4, the expected size in pixels."""
    if end - start < 6 or data[start] != 8:
        return _BAD_FRAME
    components = np.int64(data[start + 5])
    if components not in (1, 3) or end - start != 6 + 3 * components:
        return _BAD_FRAME
    for component in range(components):
        sampling, table = data[start + 7 + 3 * component], data[start + 8 + 3 * component]
        if not 1 <= sampling >> 4 <= 4 or not 1 <= sampling & 15 <= 4 or table > 3:
            return _BAD_FRAME
    if (
        np.int64(data[start + 1]) << 8 | data[start + 2] != height
        or np.int64(data[start + 3]) << 8 | data[start + 4] != width
    ):
        return _OTHER_SIZE
    return _INTACT


@njit("i8(u1[::1], i8, i8, i8, i8, u1[::1])", nogil=True)
def _scan_fault(
    data: Bytes, start: np.int64, end: np.int64, frame: np.int64, kind: np.int64, defined: Bytes
) -> np.int64:
    """Checks a SOS segment against the frame header at `frame` (0: none yet) and the tables that are defined."""
    if frame == 0 or end - start < 4:
        return _BAD_SCAN
    components = np.int64(data[start])
    frame_components = np.int64(data[frame + 5])
    if not 1 <= components <= frame_components or end - start != 4 + 2 * components:
        return _BAD_SCAN
    for scan_component in range(components):
        found = False
        for component in range(frame_components):
            if data[frame + 6 + 3 * component] == data[start + 1 + 2 * scan_component]:
                found = True
                if not defined[data[frame + 8 + 3 * component]] & 1:
                    return _NO_TABLE
        dc_table, ac_table = data[start + 2 + 2 * scan_component] >> 4, data[start + 2 + 2 * scan_component] & 15
        if not found or dc_table > 3 or ac_table > 3:
            return _BAD_SCAN
        # A progressive scan uses only one kind of table; which one depends on its spectral selection.
        if kind != _SOF2 and (not defined[dc_table] & 2 or not defined[ac_table] & 4):
            return _NO_TABLE
    return _INTACT


@njit("i8(u1[::1], i8, i8)", nogil=True)
def _fault(data: Bytes, width: np.int64, height: np.int64) -> np.int64:
    """Walks the markers up to the first scan; returns a code of FAULTS."""
    size = len(data)
    if size < 4 or data[0] != 0xFF or data[1] != _SOI:
        return _NO_START
    defined = np.zeros(4, np.uint8)
    position, frame, kind = np.int64(2), np.int64(0), np.int64(0)
    while True:
        if position + 4 > size or data[position] != 0xFF:
            return _NO_MARKER
        marker = np.int64(data[position + 1])
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        start, end = position + 4, position + 2 + (np.int64(data[position + 2]) << 8 | data[position + 3])
        if marker < _SOF0 or _SOI - 8 <= marker <= _EOI:  # restart markers, SOI, EOI: none has a place here
            return _NO_MARKER
        if end < start or end > size:
            return _TOO_LONG
        fault: np.int64 = _INTACT
        if marker == _DQT:
            fault = _quantisation_fault(data, start, end, defined)
        elif marker == _DHT:
            fault = _huffman_fault(data, start, end, defined)
        elif marker == _SOS:
            fault = _scan_fault(data, start, end, frame, kind, defined)
            if fault:
                return fault
            if end + 2 >= size:
                return _NO_DATA
            return _INTACT if data[size - 2] == 0xFF and data[size - 1] == _EOI else _NO_END
        elif marker == _DRI:
            fault = _INTACT if end - start == 2 else _NO_MARKER
        elif _SOF0 <= marker <= _SOF_LAST:
            if marker > _SOF2 or frame:
                return _OTHER_TYPE if marker > _SOF2 else _BAD_FRAME
            fault = _frame_fault(data, start, end, width, height)
            frame, kind = start, marker
        if fault:
            return fault
        position = end


@njit("void(u8[::1], i8[::1], i8[::1], i8[::1], u1[::1])", nogil=True)
def _walk(
    addresses: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    faults: Bytes,
) -> None:
    for image in range(len(addresses)):
        data = numba.carray(address_as_void_pointer(addresses[image]), sizes[image], dtype=np.uint8)
        faults[image] = _fault(data, widths[image], heights[image])


def header_faults(
    addresses: NDArray[np.integer],
    sizes: NDArray[np.integer],
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
) -> NDArray[np.uint8]:
    """Checks N encoded JPEGs in memory.

    Args:
        addresses: (N,) of the first byte of each; the caller keeps the memory alive.
        sizes: (N,) bytes.
        widths, heights: (N,) pixels that the shard set's index states.

    Returns:
        (N,) codes into `FAULTS`; 0 means that a decoder can parse the header and that the end of the image is there.
    """
    faults = np.empty(len(addresses), np.uint8)
    integers = (np.ascontiguousarray(values, np.int64) for values in (sizes, widths, heights))
    _walk(np.ascontiguousarray(addresses, np.uint64), *integers, faults)
    return faults
