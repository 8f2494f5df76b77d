"""Decoded pixels: of any mode and depth to 8 bits a channel, and upright.

Deeper pixels are scaled by their range rather than clipped to 255, as Pillow's `convert` does:

- 16 unsigned bits, and the 12 bits of some TIFFs: their upper 8 bits, as Pillow itself does with deep colour images.
- Floats, signed integers and integers of 32 bits: linear from black to white. The ends are the file's SMinSampleValue and
  SMaxSampleValue (TIFF); else 0 and 1 for floats that all lie between; else the least and the largest finite pixel. NaN is black.

Transparent pixels are put on white, as in a browser, unless four channels are asked for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

COLOUR_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

PlaceInPixels = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels, whose edges may lie within a pixel."""

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _LEAST, _MOST = 258, 262, 339, 340, 341  # tags of TIFF
_MIRRORED = {1: "", 2: "x", 3: "xy", 4: "y", 5: "", 6: "x", 7: "xy", 8: "y"}
"""How EXIF orientations are undone: the two axes are swapped from 5 on, then these are mirrored."""


def in_eight_bits(image: Image.Image) -> Image.Image:
    """The image, in mode L or LA if its pixels are deeper than 8 bits. Call it on whole images, whose range all parts share."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = values >> (4 if _first(tags.get(_BITS)) == 12 else 8)
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, as Pillow scales all of PPM's depths to
        grey = values >> 8
    else:
        if image.mode == "I" and tags and _first(tags.get(_SAMPLE_FORMAT, 1)) == 1:
            values = values.view(np.uint32)
        grey = _measured(values, _first(tags.get(_LEAST)), _first(tags.get(_MOST)))
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow sees to in 8 bits alone
        grey = 255 - grey
    result = Image.fromarray(grey.astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        result.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return result


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The colours of an image of 8 bits in mode L, RGB or RGBA; itself where it is in it."""
    clear = "transparency" in image.info
    if image.mode == mode and not clear:
        return image
    if clear or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        if image.mode == "La":  # which Pillow converts to no other
            image = image.convert("LA")
        image = image.convert("RGBA")
        if mode == "RGBA":
            return image
        seen = Image.new("RGB", image.size, "white")
        seen.paste(image, mask=image)
        image = seen
    elif image.mode not in ("1", "L", "P", "RGB"):  # YCbCr, CMYK, LAB, HSV, RGBX
        image = image.convert("RGB")
    return image.convert(mode)


def _measured(values: np.ndarray, least: float | None, most: float | None) -> np.ndarray:
    """Values of any range, scaled to 0 to 255."""
    finite = values[np.isfinite(values)]
    if least is None or most is None or not -math.inf < least < most < math.inf:
        least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        if values.dtype.kind == "f" and least >= 0 and most <= 1:
            least, most = 0.0, 1.0
    with np.errstate(all="ignore"):
        scaled = (values.astype(np.float64) - least) / ((most - least) or 1) * 255
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0, posinf=255, neginf=0), 0, 255))


def _first(value: Any) -> Any:
    """The first value of a tag, which has one value, or one for each channel."""
    return value[0] if isinstance(value, tuple) and value else value


def upright(pixels: Image.Image, orientation: int) -> Image.Image:
    """The upright image of stored pixels with this EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.transpose(Image.Transpose.TRANSPOSE)
    if "x" in _MIRRORED[orientation]:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "y" in _MIRRORED[orientation]:
        pixels = pixels.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return pixels


def as_stored(box: PlaceInPixels, size: tuple[int, int], orientation: int) -> PlaceInPixels:
    """The box in the stored pixels of a box in the upright image, whose size is (width, height)."""
    left, top, right, bottom = _mirrored(box, size, orientation)
    return (left, top, right, bottom) if orientation < 5 else (top, left, bottom, right)


def as_shown(box: PlaceInPixels, size: tuple[int, int], orientation: int) -> PlaceInPixels:
    """The box in the upright image, of this size (width, height), of a box in the stored pixels."""
    left, top, right, bottom = box
    return _mirrored(box if orientation < 5 else (top, left, bottom, right), size, orientation)


def _mirrored(box: PlaceInPixels, size: tuple[int, int], orientation: int) -> PlaceInPixels:
    (left, top, right, bottom), (width, height) = box, size
    if "x" in _MIRRORED[orientation]:
        left, right = width - right, width - left
    if "y" in _MIRRORED[orientation]:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom
