"""The file that a shard stores for an image: the original, or a smaller one."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

from PIL import Image

from crate_mae.data.reading import shown_size, whole
from crate_mae.data.source import Source, UnreadableImage
from crate_mae.data.unreadable import Unreadable

_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "PPM": ".ppm",
}
"""Suffixes of the formats whose files may be stored as they are."""

_EIGHT_BITS = {"1", "L", "LA", "P", "RGB", "RGBA"}

_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}

_ORIENTATION = 0x0112

_LONGEST_JPEG = 65_500
"""The longest side of a JPEG in pixels."""

_GAP = 2
"""A JPEG is decoded at no less than this many times the wanted size, and resized from there, without a visible difference."""


class PackedImage(NamedTuple):
    suffix: str
    data: bytes


def packed_image(source: Source, index: int, *, short_side: int, quality: int) -> PackedImage | Unreadable:
    """The file to store for an image, or why there is none. All of it has been decoded.

    Args:
        short_side: pixels; an image with a longer one is made smaller, its aspect kept.
        quality: of JPEG, 1 to 100.
    """
    name = source.name(index)
    try:
        with source.image(index) as image:
            is_small = min(image.size) <= short_side
            suffix = _SUFFIXES.get(image.format or "")
            data = _file_of(image) if is_small and suffix and image.mode in _EIGHT_BITS else None
            pixels = _decoded(image, short_side, name)
            if suffix and data and _is_upright_and_still(image):
                return PackedImage(suffix, data)
            if is_small and image.format is None:  # pixels that no encoder has changed yet, as of CIFAR
                return _as_png(pixels)
            return _encoded(pixels, quality, "4:4:4" if is_small else "4:2:0")
    except UnreadableImage as error:
        return Unreadable.of(error)


def _file_of(image: Image.Image) -> bytes | None:
    """The bytes that the image is read from; None of one that was never in a file."""
    if (file := getattr(image, "fp", None)) is None:
        return None
    position = file.tell()  # where its decoder goes on
    file.seek(0)
    data = file.read()
    file.seek(position)
    return data


def _decoded(image: Image.Image, short_side: int, name: str) -> Image.Image:
    """Upright, with a short side of at most `short_side`, in L or RGB or, where pixels are transparent, RGBA."""
    scale, shown = min(1.0, short_side / min(image.size)), shown_size(image, name)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        channels = 4
    else:
        channels = 1 if image.mode in ("1", "L", "F") or image.mode.startswith("I") else 3
    if scale < 1:
        width, height = (max(1, math.ceil(_GAP * scale * side)) for side in image.size)
        image.draft(None, (width, height))
    pixels = whole(image, channels, name)
    if scale < 1:
        size = [max(1, round(scale * side)) for side in shown]
        pixels = pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=_GAP)
    opaque = channels == 4 and pixels.getchannel("A").getextrema()[0] == 255
    return pixels.convert("RGB") if opaque else pixels


def _is_upright_and_still(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1 and not getattr(image, "is_animated", False)
    except Exception:  # of EXIF or later frames that are damaged, which do not matter once they are left out
        return False


def _encoded(pixels: Image.Image, quality: int, subsampling: str) -> PackedImage:
    if pixels.mode == "RGBA" or max(pixels.size) > _LONGEST_JPEG:
        return _as_png(pixels)
    pixels.info.clear()  # comments and profiles, which the encoders would write
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=quality, subsampling=subsampling)
    return PackedImage(".jpg", file.getvalue())


def _as_png(pixels: Image.Image) -> PackedImage:
    pixels.info.clear()
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return PackedImage(".png", file.getvalue())
