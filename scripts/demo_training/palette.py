"""Names of colours as ranges of shades: what people call red is no single red."""

from __future__ import annotations

import colorsys
from random import Random

from demo_training.scenes import COLOURS

RGB = tuple[int, int, int]
# Of each name: hue in degrees, saturation and value, from and to. No two ranges touch.
_RANGES = {
    "red": ((-12, 9), (0.72, 1.0), (0.6, 1.0)),
    "orange": ((20, 39), (0.8, 1.0), (0.88, 1.0)),
    "yellow": ((48, 61), (0.65, 1.0), (0.88, 1.0)),
    "green": ((92, 150), (0.5, 1.0), (0.36, 1.0)),
    "blue": ((204, 243), (0.62, 1.0), (0.48, 1.0)),
    "purple": ((268, 300), (0.45, 1.0), (0.4, 0.88)),
    "black": ((0, 360), (0.0, 1.0), (0.0, 0.12)),
}
CLEAR = 85  # distance of two colours, as ``distance`` counts, that every edge shows at
assert _RANGES.keys() == COLOURS.keys()


def shade(rng: Random, name: str) -> RGB:
    """One of the colours that ``name`` may mean; the plain one of the old pictures in one case of six."""
    if rng.random() < 1 / 6:
        return COLOURS[name]
    hue, saturation, value = (rng.uniform(*range_) for range_ in _RANGES[name])
    if rng.random() < 0.3:  # screens' pure colours, more often than chance
        saturation = 1.0 if name != "black" else 0.0
    return _rgb(hue, saturation, value)


def any_colour(rng: Random) -> RGB:
    """For what is not asked about."""
    return _rgb(rng.uniform(0, 360), rng.random(), rng.random())


def light(rng: Random) -> RGB:
    return _rgb(rng.uniform(0, 360), rng.choice((0.0, rng.uniform(0, 0.3))), rng.uniform(0.8, 1.0))


def dark(rng: Random) -> RGB:
    return _rgb(rng.uniform(0, 360), rng.choice((0.0, rng.uniform(0, 0.6))), rng.uniform(0.05, 0.35))


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def lightness(rgb: RGB) -> float:
    """0 to 255, as grey pictures show it."""
    red, green, blue = rgb
    return 0.3 * red + 0.59 * green + 0.11 * blue


def distance(one: RGB, other: RGB) -> float:
    """How far apart two colours look: differences of lightness count more than those of hue."""
    gap = max(abs(a - b) for a, b in zip(one, other, strict=True))
    return abs(lightness(one) - lightness(other)) + 0.5 * gap
