"""Draws synthetic images: an object with a shape and a surface pattern, shaded, in front of a cluttered background.

Class c (0 to MAX_CLASSES - 1) is a pair (shape, pattern). The random generator that is passed in decides everything
else: size, position, rotation, mirroring, colours, shading, shadow, clutter and sensor noise. The result is (H, W, 3)
uint8 RGB, the same bytes for the same generator state. Colours have the same distribution in every class, so the mean
colour of an image does not reveal its class.

Computations are float32 on whole planes, (H, W) or (3, H, W), in pixel values 0-255. A shape is a signed distance
field: negative inside, in units of the object's radius. A pattern is a signed value whose sign selects one of two
surface colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft

from pipeline.synthetic.settings import MAX_CLASSES

Plane = NDArray[np.floating[Any]]
DIAMETER_PER_SHORT_SIDE = (0.55, 0.85)  # smallest and largest diameter of the object, as a fraction of the short side
MAX_ROTATION_RAD = 0.6  # to either side
MAX_LOG_ASPECT_RATIO = 0.45  # sides differ by a factor up to exp(0.45) = 1.57
NOISE_SD_0_255 = 4.0  # sensor noise, in pixel values 0-255
TINT_SD_0_255 = 24.0  # in pixel values 0-255


class Surface(NamedTuple):
    """Pixel positions at which shapes and patterns are evaluated, in the object's coordinates.

    Attributes:
        x: (H, W) In units of the object's radius, to the right.
        y: (H, W) In units of the object's radius, downwards.
        r: (H, W) Distance from the centre, in the same units.
        angle: (H, W) In radians.
    """

    x: Plane
    y: Plane
    r: Plane
    angle: Plane


def _length(x: Plane, y: Plane) -> Plane:
    """Like np.hypot without its protection against overflow, which makes it several times faster."""
    return np.sqrt(x * x + y * y)


def _fold(angle: Plane, r: Plane, fold: int) -> tuple[Plane, Plane]:
    """Cartesian coordinates in one of `fold` equal wedges, mirrored about the middle line of the wedge."""
    wedge = math.tau / fold
    folded = np.abs(angle - wedge * np.round(angle / wedge))
    return r * np.cos(folded), r * np.sin(folded)


def _triangle(s: Surface) -> Plane:
    return _fold(s.angle + math.pi / 2, s.r, 3)[0] - 0.6


def _star(s: Surface) -> Plane:
    along, across = _fold(s.angle + math.pi / 2, s.r, 5)
    inner_x, inner_y = 0.5 * math.cos(math.pi / 5), 0.5 * math.sin(math.pi / 5)
    distance: Plane = ((along - 1.1) * inner_y + across * (1.1 - inner_x)) / math.hypot(1.1 - inner_x, inner_y)
    return distance


def _cross(s: Surface) -> Plane:
    ax, ay = np.abs(s.x), np.abs(s.y)
    distance: Plane = np.maximum(np.minimum(ax, ay) - 0.34, np.maximum(ax, ay) - 1)
    return distance


def _heart(s: Surface) -> Plane:
    ax, y = np.abs(s.x), s.y + 0.1
    distance: Plane = np.minimum((ax + np.abs(y) - 0.9) * 0.707, _length(ax - 0.45, y + 0.45) - 0.636)
    return distance


def _gear(s: Surface) -> Plane:
    teeth = 0.86 + 0.14 * np.clip(3 * np.cos(9 * s.angle), -1, 1)
    distance: Plane = np.maximum(s.r - teeth, 0.3 - s.r)
    return distance


def _spiral(s: Surface) -> Plane:
    turns = s.r / 0.42 - s.angle / math.tau
    return np.maximum(np.abs(turns - np.round(turns)) * 0.42 - 0.12, s.r - 1)


# (name, other name, signed distance)
SHAPES: list[tuple[str, str, Callable[[Surface], Plane]]] = [
    ("ball", "globe", lambda s: s.r - 0.9),
    ("ring", "hoop", lambda s: np.abs(s.r - 0.72) - 0.28),
    ("triangle", "trigon", _triangle),
    ("tile", "square", lambda s: np.maximum(np.abs(s.x), np.abs(s.y)) - 0.82),
    ("star", "pentagram", _star),
    ("cross", "plus sign", _cross),
    ("crescent", "sickle", lambda s: np.maximum(s.r - 1, 0.8 - _length(s.x - 0.55, s.y))),
    ("heart", "valentine", _heart),
    ("flower", "blossom", lambda s: (s.r - 0.7 - 0.3 * np.cos(6 * s.angle)) * 0.6),
    ("gear", "cogwheel", _gear),
    ("spool", "bobbin", lambda s: np.maximum(np.abs(s.y) - 0.9, (np.abs(s.x) - 0.2 - 0.8 * np.abs(s.y)) * 0.78)),
    ("spiral", "coil", _spiral),
]


def _cells(coordinate: Plane, size: float) -> Plane:
    """Signed distance to the centre of the nearest cell, for cells of `size`."""
    return coordinate - size * np.round(coordinate / size)


def _scales(s: Surface) -> Plane:
    row = np.round(s.y / 0.3)
    across = _cells(s.x + 0.2 * np.abs(_cells(row, 2)), 0.4)
    value: Plane = np.abs(_length(across, s.y - 0.3 * row + 0.15) - 0.2) - 0.055
    return value


def _bricks(s: Surface) -> Plane:
    row = np.round(s.y / 0.3)
    joint = np.abs(_cells(s.x + 0.3 * np.abs(_cells(row, 2)), 0.6))
    return np.minimum(0.3 - joint, 0.15 - np.abs(s.y - 0.3 * row)) - 0.045


def _marble(s: Surface) -> Plane:
    swirl = np.sin(3 * s.y + 2 * np.sin(2.5 * s.x + 1))
    value: Plane = np.sin(7 * s.x + 2.5 * swirl) / 9
    return value


# (name, signed value: approximately the distance to the nearest change of colour)
PATTERNS: list[tuple[str, Callable[[Surface], Plane]]] = [
    ("checkered", lambda s: np.sin(6.5 * s.x) * np.sin(6.5 * s.y) / 6.5),
    ("striped", lambda s: np.sin(11 * s.y) / 11),
    ("polka-dotted", lambda s: 0.14 - _length(_cells(s.x, 0.42), _cells(s.y, 0.42))),
    ("wooden", lambda s: np.sin(17 * _length(s.x - 0.3, 1.5 * s.y) + np.sin(3 * s.x + 5 * s.y)) / 17),
    ("rayed", lambda s: np.sin(10 * s.angle) * s.r / 10),
    ("bricked", _bricks),
    ("scaly", _scales),
    ("zigzag", lambda s: np.sin(11 * (s.y + np.abs(_cells(s.x, 0.6)))) / 15),
    ("two-tone", lambda s: s.x),
    ("latticed", lambda s: 0.06 - np.minimum(np.abs(_cells(s.x, 0.3)), np.abs(_cells(s.y, 0.3)))),
    ("marbled", _marble),
    ("polished", lambda s: 0.35 - _length(s.x + 0.3, s.y + 0.3)),
]
assert len(SHAPES) * len(PATTERNS) == MAX_CLASSES


def _pair(class_index: int) -> tuple[int, int]:
    """Positions in SHAPES and PATTERNS. Every class has another pair; the first twelve share no shape or pattern."""
    shape = class_index % len(SHAPES)
    return shape, (shape + class_index // len(SHAPES)) % len(PATTERNS)


def class_words(class_index: int) -> str:
    """The words of a class, as in the devkit: names separated by commas."""
    shape, pattern = _pair(class_index)
    name, other_name, _ = SHAPES[shape]
    return f"{PATTERNS[pattern][0]} {name}, {PATTERNS[pattern][0]} {other_name}"


def draw_image(class_index: int, min_side: int, max_side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws one image.

    Args:
        class_index: 0 to MAX_CLASSES - 1.
        min_side: Smallest height and width, in pixels.
        max_side: Largest height and width, in pixels.
        rng: Source of all random choices.

    Returns:
        The image, (H, W, 3) uint8 RGB.
    """
    size = np.exp(rng.uniform(np.log(min_side), np.log(max_side)))
    stretch = np.exp(rng.uniform(-MAX_LOG_ASPECT_RATIO, MAX_LOG_ASPECT_RATIO) / 2)
    height, width = (int(np.clip(round(side), min_side, max_side)) for side in (size / stretch, size * stretch))

    # The background is out of focus, so half the resolution is enough for it; the object is sharp.
    background = Image.fromarray(_background(height // 2, width // 2, rng)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    image_chw = np.asarray(background).transpose(2, 0, 1).astype(np.float32, order="C")
    y, x = _centred(height, width)
    _put_object(image_chw, class_index, y, x, rng)
    from_above, from_left = rng.uniform(-0.4, 0.4, 2).astype(np.float32) / (height / 2, width / 2)
    image_chw *= np.float32(rng.uniform(0.85, 1.15)) * (1 + from_above * y + from_left * x)
    image_chw += rng.standard_normal((height, width), dtype=np.float32) * np.float32(NOISE_SD_0_255)
    return _to_bytes(image_chw)


def _centred(height: int, width: int) -> tuple[Plane, Plane]:
    """Pixel coordinates y (H, 1) and x (1, W), with the origin in the centre of the image."""
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    return rows[:, None] - np.float32(height / 2), columns[None, :] - np.float32(width / 2)


def _to_bytes(image_chw: Plane) -> NDArray[np.uint8]:
    """Pixel values (3, H, W), clipped to 0-255, as (H, W, 3) uint8."""
    return np.ascontiguousarray(np.clip(image_chw, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _natural_noise(height: int, width: int, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Two independent planes (H, W) of variance 1. Their amplitude falls like 1/f, as it does in photographs."""
    rows, columns = fft.next_fast_len(height), fft.next_fast_len(width)
    frequency = np.hypot(fft.fftfreq(rows)[:, None], fft.fftfreq(columns)[None, :])
    frequency[0, 0] = np.inf
    amplitude = (frequency ** -rng.uniform(1.1, 1.8)).astype(np.float32)
    white = rng.standard_normal((rows, columns, 2), dtype=np.float32).view(np.complex64)[..., 0]
    field = fft.ifft2(amplitude * white)
    field /= np.sqrt(np.mean(field.real**2 + field.imag**2) / 2)
    return field.real[:height, :width], field.imag[:height, :width]


def _colour(luminance: float, rng: np.random.Generator) -> Plane:
    """A colour (3, 1, 1) of this luminance with a random tint: in photographs luminance varies more than hue."""
    tint = rng.normal(0, TINT_SD_0_255, 3)
    colour: Plane = (luminance + tint - tint.mean()).astype(np.float32)[:, None, None]
    return colour


def _blend(image_chw: Plane, cover: Plane, colour: Plane) -> None:
    """Blends `colour` into the image, in place. `cover` (H, W) is its opacity, 0 to 1."""
    change = colour - image_chw
    change *= cover
    image_chw += change


def _background(height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A background (H, W, 3) uint8: noise with a natural spectrum, behind rectangles that are more or less in focus."""
    y, x = _centred(height, width)
    noise, tint_noise = _natural_noise(height, width, rng)
    luminance, extent = rng.uniform(35, 220), min(height, width)
    texture = np.float32(rng.uniform(6, 24)) * noise + _colour(0, rng) * np.float32(rng.uniform(0.2, 0.7)) * tint_noise
    image_chw = _colour(luminance, rng) + texture
    for _ in range(rng.integers(3, 7)):
        turn = rng.uniform(0, np.pi)
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        along = cos * x + sin * y - np.float32(rng.uniform(-0.6, 0.6) * extent)
        across = cos * y - sin * x - np.float32(rng.uniform(-0.6, 0.6) * extent)
        half_length, half_width = rng.choice([0.08, 0.2, 2.0]) * extent, rng.uniform(0.01, 0.15) * extent
        distance = np.maximum(np.abs(along) - np.float32(half_length), np.abs(across) - np.float32(half_width))
        cover = np.clip(0.5 - distance / np.float32(rng.uniform(1, 0.06 * extent)), 0, 1)
        colour = _colour(luminance + rng.normal(0, 35), rng) + np.float32(rng.uniform(0.3, 1)) * texture
        _blend(image_chw, cover * np.float32(rng.uniform(0.4, 1)), colour)
    return _to_bytes(image_chw)


def _put_object(image_chw: Plane, class_index: int, y: Plane, x: Plane, rng: np.random.Generator) -> None:
    """Draws the object of a class, with its shadow, into the image, in place.

    Args:
        image_chw: The image, (3, H, W).
        class_index: 0 to MAX_CLASSES - 1.
        y: Pixel coordinates from the centre, (H, 1).
        x: Pixel coordinates from the centre, (1, W).
        rng: Source of all random choices.
    """
    short_side = min(image_chw.shape[1:])
    radius = np.float32(rng.uniform(*DIAMETER_PER_SHORT_SIDE) * short_side / 2)
    down, right = (rng.uniform(-0.7, 0.7, 2) * (short_side / 2 - radius)).astype(np.float32)
    surface = _surface((y - down) / radius, (x - right) / radius, rng)
    shape, pattern = _pair(class_index)
    distance_px = SHAPES[shape][2](surface) * radius

    softness, reach = np.float32(rng.uniform(0.02, 0.3)) * radius, rng.uniform(-0.15, 0.15, 2) * radius
    shadow = np.clip(0.5 - _shifted(distance_px, *reach.astype(int)) / softness, 0, 1)
    image_chw *= 1 - np.float32(rng.uniform(0.1, 0.5)) * shadow

    dark = rng.uniform(15, 140)
    tones = [_colour(dark, rng), _colour(dark + rng.uniform(90, 115), rng)]
    first, second = tones if rng.random() < 0.5 else tones[::-1]
    mix = np.clip(0.5 + PATTERNS[pattern][1](surface) * radius, 0, 1)
    slope_x, slope_y = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
    colour = mix * (second - first)
    colour += first
    colour *= 1 + slope_x * surface.x + slope_y * surface.y
    _blend(image_chw, np.clip(0.5 - distance_px, 0, 1), colour)


def _shifted(plane: Plane, down: int, right: int) -> Plane:
    """The plane moved by whole pixels; values at the borders are repeated."""
    rows, columns = (np.arange(n) - shift for n, shift in zip(plane.shape, (down, right), strict=True))
    moved: Plane = plane[np.ix_(rows.clip(0, plane.shape[0] - 1), columns.clip(0, plane.shape[1] - 1))]
    return moved


def _surface(y: Plane, x: Plane, rng: np.random.Generator) -> Surface:
    """The object's coordinates for offsets from its centre in radii: rotated, slightly squeezed, perhaps mirrored."""
    turn, squeeze = rng.uniform(-MAX_ROTATION_RAD, MAX_ROTATION_RAD), np.float32(np.exp(rng.uniform(-0.15, 0.15)))
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u = (cos * x + sin * y) * (squeeze * np.float32(rng.choice([-1, 1])))
    v = (cos * y - sin * x) / squeeze
    return Surface(u, v, _length(u, v), np.arctan2(v, u))
