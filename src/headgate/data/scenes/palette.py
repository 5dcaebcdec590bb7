"""Named colours of objects and grounds, as whole numbers 0 to 255.

Objects have saturation 0.9 and value 1, grounds saturation 0.6 and value 0.45, so that an object shows on a ground of its
own hue. Whole-number colours and coverages in sixteenths keep the compositing exact in float32.
"""

from __future__ import annotations

import math

__all__ = ["COLOURS", "HUES", "floor_rgb", "ground_rgb", "hsv_to_rgb", "hue_of", "luma", "object_rgb"]

_HUE_DEGREES = {
    "red": 0,
    "orange": 30,
    "yellow": 60,
    "green": 120,
    "cyan": 180,
    "blue": 240,
    "purple": 275,
    "pink": 320,
}
_GREYS = {"grey": (0.75, 0.45), "white": (1.0, 0.9), "black": (0.0, 0.0)}  # value as an object, value as a ground

HUES = tuple(_HUE_DEGREES)
COLOURS = (*HUES, *_GREYS)


def hsv_to_rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """Turn hue, saturation and value, each in [0, 1], into red, green and blue in 0 to 255.

    The closed form of the hexcone model (Smith, "Color gamut transform pairs", SIGGRAPH 1978):
    channel n of (5, 3, 1) is v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6.
    """

    def channel(n: int) -> int:
        k = (n + 6.0 * hue) % 6.0
        return math.floor(255.0 * value * (1.0 - saturation * max(0.0, min(k, 4.0 - k, 1.0))) + 0.5)

    return channel(5), channel(3), channel(1)


def hue_of(name: str) -> float:
    """Give the hue of a colour in [0, 1); NaN for grey, white and black."""
    return _HUE_DEGREES[name] / 360.0 if name in _HUE_DEGREES else math.nan


def object_rgb(name: str) -> tuple[int, int, int]:
    """Give the colour of an object."""
    return hsv_to_rgb(hue_of(name), 0.9, 1.0) if name in HUES else hsv_to_rgb(0.0, 0.0, _GREYS[name][0])


def ground_rgb(name: str) -> tuple[int, int, int]:
    """Give the colour of a plain ground or a wall."""
    return hsv_to_rgb(hue_of(name), 0.6, 0.45) if name in HUES else hsv_to_rgb(0.0, 0.0, _GREYS[name][1])


def floor_rgb(name: str) -> tuple[int, int, int]:
    """Give the colour of a floor: a darker ground, so that a floor shows against a wall of its own hue."""
    return hsv_to_rgb(hue_of(name), 0.6, 0.28) if name in HUES else hsv_to_rgb(0.0, 0.0, 0.62 * _GREYS[name][1])


def luma(rgb: tuple[int, int, int]) -> int:
    """Give the grey level of a colour (ITU-R BT.601), rounded."""
    return (299 * rgb[0] + 587 * rgb[1] + 114 * rgb[2] + 500) // 1000
