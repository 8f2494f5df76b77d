"""Pictures without files, to measure everything but their reading and decoding."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from PIL import Image, ImageChops

from crate_mae.data.source import Source

_DISTINCT = 32


class SyntheticImages(Source):
    """RGB pictures with a photograph's statistics: amplitudes that fall as the frequency grows, channels that go together.

    A function of the index alone. 32 pictures are drawn, once a process (6 MiB at the default size), and the others are these
    rolled around by the index, so that an image costs a copy. They are images for a loader or a GPU to be timed with, not to
    learn from.

    Args:
        count: how many.
        size: (height, width).
        seed: of the pictures.

    Raises:
        ValueError: no image, or one without pixels.
    """

    def __init__(self, count: int, size: tuple[int, int] = (256, 341), seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1 image, got {count}")
        if min(size) < 1:
            raise ValueError(f"size: expected a height and a width of at least 1, got {size}")
        self.count, self.size, self.seed = count, tuple(size), seed

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Image.Image:
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        turn, number = divmod(index, _DISTINCT)
        picture = _picture(self.size, self.seed, number)
        return ImageChops.offset(picture, 89 * turn % picture.width, 97 * turn % picture.height)

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"synthetic {self.count} {self.size} {self.seed}".encode()).hexdigest()


@functools.lru_cache(maxsize=4 * _DISTINCT)
def _picture(size: tuple[int, int], seed: int, number: int) -> Image.Image:
    """Random grids of 2, 4, 8, ... cells a side enlarged and added up, each a little fainter than the one before; half of the
    contrast is in all channels alike."""
    rng = np.random.default_rng((seed, number))
    height, width = size
    total = np.zeros((height, width, 3), np.float32)
    side, amplitude = 2, 40.0
    while side <= max(size):
        grid = amplitude * (rng.standard_normal((side, side, 1)) + 0.5 * rng.standard_normal((side, side, 3)))
        for channel in range(3):
            layer = Image.fromarray(grid[..., channel].astype(np.float32))
            total[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
        side, amplitude = 2 * side, 0.8 * amplitude
    return Image.fromarray(np.clip(116 + total, 0, 255).astype(np.uint8))
