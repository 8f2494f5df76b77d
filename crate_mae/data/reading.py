"""A stand-in: image files are opened by `reading` as it is built elsewhere."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from crate_mae.data.source import UnreadableImage

_FORMATS = "apng avif bmp dib gif ico jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm qoi tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _FORMATS.split())


def open_file(path: Path, name: str = "") -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise UnreadableImage(name or path, "vanished", str(error)) from error
    except Exception as error:
        raise UnreadableImage(name or path, "no image", str(error)) from error
