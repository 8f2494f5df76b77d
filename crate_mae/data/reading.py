"""Stand-in until reading is there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from crate_mae.data.source import UnreadableImage


def open_image(file: BinaryIO | bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except Exception as error:
        raise UnreadableImage(name, "no image" if file else "empty", str(error)) from error


def open_file(path: Path, name: str = "") -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise UnreadableImage(name or path, "vanished", str(error)) from error
