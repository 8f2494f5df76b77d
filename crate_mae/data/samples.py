"""Images as the items of data sets: cut to one size, with all that chance decides about them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from crate_mae.data.reading import part, shown_size
from crate_mae.data.source import Source, UnreadableImage
from crate_mae.data.transforms import Size, centred_box, draw_box

BLUR_SIGMAS = (0.1, 2.0)
"""Pixels, between which the width of a Gaussian blur is drawn: as in BYOL, DINO and DeiT III."""

_ATTEMPTS = 100
"""Images that are tried in the place of one that cannot be read."""


class Sample(NamedTuple):
    """An image, and what chance decides about it. A batch is tensors with a dimension more, in front.

    Attributes:
        pixels: uint8 [height, width, channels], as decoders give them, cropped; the rest is left to the device (`augmentation`).
        noise: float32 [patches], uniform in [0, 1): the patches with the most are masked.
        flip: bool, whether it is mirrored.
        blur: float, the standard deviation of a Gaussian blur in pixels; 0 for none.
        solarize: bool, whether its brighter half is inverted.
    """

    pixels: torch.Tensor
    noise: torch.Tensor
    flip: Any
    blur: Any
    solarize: Any


class PretrainImages(Dataset[Sample]):
    """Images to train on, by (epoch, image): a random resized crop, its mask, and whether it is flipped, blurred, solarised.

    In the place of an image that cannot be read, (epoch, image, stand-in) has another with the same mask and flip.

    Args:
        size: of the crops, in pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        patches: of an image.
        scale, ratio: as of `transforms.draw_box`.
        flip: whether half of them are mirrored.
        blur, solarize: the fraction of them that is.
    """

    def __init__(
        self,
        source: Source,
        size: Size,
        seed: int,
        *,
        channels: int = 3,
        patches: int = 1,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        blur: float = 0.0,
        solarize: float = 0.0,
    ) -> None:
        self.source, self.size, self.seed, self.channels, self.patches = source, size, seed, channels, patches
        self.scale, self.ratio, self.flip, self.blur, self.solarize = scale, ratio, flip, blur, solarize

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, index, *stand_in = key
        rng = np.random.default_rng((self.seed, epoch, index))
        noise = torch.from_numpy(rng.random(self.patches, dtype=np.float32))
        flip, blur, solarize = rng.random(3) < (self.flip / 2, self.blur, self.solarize)
        sigma = rng.uniform(*BLUR_SIGMAS) if blur else 0.0
        index = stand_in[0] if stand_in else index
        image, name = self.source.image(index), _Name(self.source, index)
        box = draw_box(shown_size(image, name), rng, scale=self.scale, ratio=self.ratio)
        pixels = part(image, box, self.size, self.channels, name).permute(1, 2, 0)
        return Sample(pixels, noise, bool(flip), sigma, bool(solarize))

    def instead(self, key: tuple[int, ...], attempt: int) -> tuple[int, int, int]:
        """The key to try in the place of one that cannot be read."""
        epoch, index = key[:2]
        rng = np.random.default_rng((self.seed, epoch, index, attempt))
        return epoch, index, int(rng.integers(len(self)))


class CentreCropped(Dataset[torch.Tensor]):
    """Images uncut by chance: uint8 [channels, height, width]. In the place of one that cannot be read stands another, always
    the same."""

    def __init__(self, source: Source, size: Size, channels: int = 3) -> None:
        self.source, self.size, self.channels = source, size, channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        image, name = self.source.image(index), _Name(self.source, index)
        box = centred_box(shown_size(image, name), self.size[1] / self.size[0])
        return part(image, box, self.size, self.channels, name)

    def instead(self, index: int, attempt: int) -> int:
        return int(np.random.default_rng((index, attempt)).integers(len(self)))


class _Name:
    """An image's name, which some sources would have to read for, and only errors need."""

    def __init__(self, source: Source, index: int) -> None:
        self.source, self.index = source, index

    def __str__(self) -> str:
        return self.source.name(self.index)


def readable(images: Any, key: Any) -> tuple[Any, list[UnreadableImage]]:
    """The item, or the first of those in its place that can be read, and what was met before it.

    Args:
        images: as `PretrainImages` and `CentreCropped`, with `instead`.

    Raises:
        UnreadableImage: none of a hundred can be read.
    """
    met: list[UnreadableImage] = []
    tried = key
    for attempt in itertools.count():
        try:
            return images[tried], met
        except UnreadableImage as error:
            met.append(error)
            if attempt == _ATTEMPTS or not hasattr(images, "instead"):
                raise
        tried = images.instead(key, attempt)
    raise AssertionError


def readable_items(images: CentreCropped, keys: Sequence[int]) -> torch.Tensor:
    """uint8 [len(keys), channels, height, width]."""
    return torch.stack([readable(images, key)[0] for key in keys])
