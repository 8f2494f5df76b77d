"""The boxes of crops, and the standardisation from stored pixels to the model's input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]
"""(height, width), in the order of tensor dimensions."""


Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, the last two exclusive, as in Pillow."""


NUMBERS_OF_A_BOX = 22
"""How many uniform numbers `draw_box` takes at most."""


def draw_box(
    size: tuple[int, int],
    numbers: Iterable[float],
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random part of an image of this size, (width, height).

    The part covers a fraction of the area uniform in `scale`, with width / height log-uniform in `ratio`. Ten draws
    are tried for one that fits; failing that, the largest centred part whose ratio is nearest to `ratio` is taken.

    Args:
        numbers: uniform in [0, 1).
    """
    width, height = size
    numbers, (narrowest, widest) = iter(numbers), map(math.log, ratio)
    for _ in range(10):
        area = width * height * (scale[0] + next(numbers) * (scale[1] - scale[0]))
        aspect = math.exp(narrowest + next(numbers) * (widest - narrowest))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(next(numbers) * (width - box_width + 1))
            top = int(next(numbers) * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    return centred_box(size, min(max(width / height, ratio[0]), ratio[1]))


def centred_box(size: tuple[int, int], aspect: float) -> Box:
    """The largest centred part with width / height = aspect of an image of this size, (width, height)."""
    width, height = size
    box_width = max(1, min(width, round(height * aspect)))
    box_height = max(1, min(height, round(width / aspect)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


class Normalization:
    """Stored pixels to model input, (pixels / 255 - mean) / std for each channel, and back.

    Works on uint8 [batch, channels, height, width], so that batches travel to the device at a byte a value.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(f"{name}: expected {channels} values, one for each image channel, got {list(values)}")
        if min(std) <= 0:
            raise ValueError(f"std: expected positive values, got {list(std)}")
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def to(self, device: torch.device) -> Normalization:
        """The same for images on ``device``, to which it need not copy its numbers then."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() / 255 - self.mean.to(pixels.device)) / self.std.to(pixels.device)

    def inverse(self, images: torch.Tensor) -> torch.Tensor:
        """Model input (any float dtype) back to uint8 pixels, values outside the range clipped."""
        pixels = (images.float() * self.std.to(images.device) + self.mean.to(images.device)) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8)
