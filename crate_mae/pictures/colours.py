"""Colours that mean something: a scale for numbers, and colours for names, made where equal steps look equally large.

That is Oklab (Ottosson, "A perceptual color space for image processing", 2020): lightness, and a plane of chroma and hue.
"""

from __future__ import annotations

import numpy as np

_OKLAB_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_LMS_TO_LINEAR_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def _linear_rgb(lightness: np.ndarray, chroma: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """[..., 3], below 0 or above 1 where there is no such colour on a screen."""
    hue = np.deg2rad(degrees)
    lab = np.stack(np.broadcast_arrays(lightness, chroma * np.cos(hue), chroma * np.sin(hue)), -1)
    return (lab @ _OKLAB_TO_LMS.T) ** 3 @ _LMS_TO_LINEAR_RGB.T


def _colours(lightness: np.ndarray, chroma: float, degrees: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: of this lightness and hue and, where a screen has none of this chroma, of the most that it has."""
    least, most = np.zeros_like(lightness), np.full_like(lightness, chroma)
    for _ in range(20):
        middle = (least + most) / 2
        rgb = _linear_rgb(lightness, middle, degrees)
        shown = ((rgb >= 0) & (rgb <= 1)).all(-1)
        least, most = np.where(shown, middle, least), np.where(shown, most, middle)
    rgb = _linear_rgb(lightness, least, degrees).clip(0, 1)
    encoded = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    return (encoded * 255).round().astype(np.uint8)


_STEPS = np.linspace(0, 1, 256)

SCALE = _colours(0.16 + 0.8 * _STEPS, 0.19, 285 + 180 * _STEPS)
"""uint8 [256, 3]: from a dark blue by red to a bright yellow, each step as much lighter as any other."""


def scaled(values: np.ndarray) -> np.ndarray:
    """The colours, uint8 [..., 3], of values from 0 to 1; those beyond have the colours of the ends."""
    return SCALE[(values.clip(0, 1) * 255).round().astype(np.uint8)]


def distinct(count: int) -> np.ndarray:
    """uint8 [count, 3]: colours that differ in hue, and every second one in lightness too."""
    number = np.arange(count)
    return _colours(np.where(number % 2, 0.78, 0.64), 0.18, 25 + 360 * number / max(1, count))


def hexadecimal(colour: np.ndarray) -> str:
    """The colour as Pillow takes it, such as "#1766a6"."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
