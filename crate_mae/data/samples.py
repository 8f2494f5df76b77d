"""Images as items of data sets: cut to one size, with the random numbers of their augmentation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from crate_mae.data.batches import Key
from crate_mae.data.draws import uniform
from crate_mae.data.reading import part, shown_size
from crate_mae.data.source import Name, Source, UnreadableImage
from crate_mae.data.transforms import NUMBERS_OF_A_BOX, Size, centred_box, draw_box

BLUR_SIGMAS = (0.1, 2.0)
"""The range of the standard deviation of a Gaussian blur, in pixels, as in BYOL, DINO and DeiT III."""

_ATTEMPTS = 100
"""How many images are tried in the place of one that cannot be read."""


class Sample(NamedTuple):
    """An image and the random numbers of its augmentation. In a batch every tensor has one more dimension, in front.

    Attributes:
        pixels: uint8 [height, width, channels], cropped; the training device does the rest (`augmentation`).
        noise: float32 [patches], uniform from 0 to 1: the patches with the most noise are masked.
        flip: bool, whether it is mirrored.
        blur: float64, the standard deviation of a Gaussian blur in pixels; 0 for none.
        solarize: bool, whether its brighter half is inverted.
        label: int64, the class of the image in `pixels`, which may be a substitute; 0 without classes.
    """

    pixels: torch.Tensor
    noise: torch.Tensor
    flip: torch.Tensor
    blur: torch.Tensor
    solarize: torch.Tensor
    label: torch.Tensor = torch.zeros((), dtype=torch.int64)


class PretrainImages(Dataset[Sample]):
    """Images to train on, by (pass, image): a random resized crop, its mask, and whether it is flipped, blurred and solarised.

    Args:
        size: of the crops, in pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        patches: of a crop.
        labels: [len(source)], the class of each image, where they are wanted.
        scale, ratio: as of `transforms.draw_box`.
        flip: whether half of the crops are mirrored.
        blur, solarize: the fraction of crops that are blurred, and solarised.
    """

    def __init__(
        self,
        source: Source,
        size: Size,
        seed: int,
        *,
        channels: int = 3,
        patches: int = 1,
        labels: np.ndarray | None = None,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        blur: float = 0.0,
        solarize: float = 0.0,
    ) -> None:
        self.source, self.size, self.seed, self.channels, self.patches = source, size, seed, channels, patches
        self.labels = labels
        self.scale, self.ratio, self.flip, self.blur, self.solarize = scale, ratio, flip, blur, solarize

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        return Sample(*(field[0] for field in self.batch([key])))

    def batch(self, keys: Sequence[Key], met: list[UnreadableImage] | None = None) -> Sample:
        """The samples of several keys, in one piece of memory; their random numbers are drawn together.

        Args:
            met: takes the images that cannot be read; others are in their place, with the same masks and flips.

        Raises:
            UnreadableImage: an image cannot be read, and `met` is not given; or a hundred in its place cannot, either.
        """
        numbers = uniform(self.seed, keys, self.patches + 4 + NUMBERS_OF_A_BOX)
        flip, blur, solarize, sigma = numbers[:, self.patches : self.patches + 4].T
        pixels = torch.empty(len(keys), *self.size, self.channels, dtype=torch.uint8)
        if get_worker_info() is not None:  # it will be handed to the process that trains
            pixels.share_memory_()
        images = [
            self._cut_into(place.permute(2, 0, 1), key, of_a_box, met)
            for place, key, of_a_box in zip(pixels, keys, numbers[:, -NUMBERS_OF_A_BOX:].tolist(), strict=True)
        ]
        narrowest, widest = BLUR_SIGMAS
        return Sample(
            pixels,
            torch.from_numpy(numbers[:, : self.patches].astype(np.float32)),
            torch.from_numpy(flip < self.flip / 2),
            torch.from_numpy(np.where(blur < self.blur, narrowest + sigma * (widest - narrowest), 0)),
            torch.from_numpy(solarize < self.solarize),
            torch.from_numpy(
                np.zeros(len(keys), np.int64) if self.labels is None else self.labels[images].astype(np.int64)
            ),
        )

    def _cut_into(self, place: torch.Tensor, key: Key, of_a_box: list[float], met: list[UnreadableImage] | None) -> int:
        """Cut an image into memory; returns its number: the key's, or that of its substitute."""
        index = key[1]
        for attempt in itertools.count():
            try:
                image, name = self.source.image(index), Name(self.source, index)
                box = draw_box(shown_size(image, name), of_a_box, scale=self.scale, ratio=self.ratio)
                part(image, box, self.size, self.channels, name, out=place)
                return index
            except UnreadableImage as error:
                if met is None:
                    raise
                met.append(error)
                if attempt == _ATTEMPTS:
                    raise
            index = int(np.random.default_rng((self.seed, *key, attempt)).integers(len(self)))
        raise AssertionError


class CentreCropped(Dataset[torch.Tensor]):
    """The largest centred part of each image, uint8 [channels, height, width]. An unreadable image always has the same
    substitute."""

    def __init__(self, source: Source, size: Size, channels: int = 3) -> None:
        self.source, self.size, self.channels = source, size, channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        image, name = self.source.image(index), Name(self.source, index)
        box = centred_box(shown_size(image, name), self.size[1] / self.size[0])
        return part(image, box, self.size, self.channels, name)

    def instead(self, index: int, attempt: int) -> int:
        return int(np.random.default_rng((index, attempt)).integers(len(self)))


class LabelledCentreCropped(CentreCropped):
    """The largest centred part of each image, with its class; a substitute has its own class.

    Args:
        labels: [len(source)].
    """

    def __init__(self, source: Source, labels: np.ndarray, size: Size, channels: int = 3) -> None:
        super().__init__(source, size, channels)
        self.labels = labels

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return super().__getitem__(index), int(self.labels[index])


def readable(images: Any, key: Any, met: list[UnreadableImage]) -> Any:
    """The item, or the first of those in its place that can be read.

    Args:
        images: as `CentreCropped`, with `instead`.
        met: gets those that cannot be read.

    Raises:
        UnreadableImage: none of a hundred can be read.
    """
    tried = key
    for attempt in itertools.count():
        try:
            return images[tried]
        except UnreadableImage as error:
            met.append(error)
            if attempt == _ATTEMPTS or not hasattr(images, "instead"):
                raise
        tried = images.instead(key, attempt)
    raise AssertionError


def batch_of(images: Any, keys: Sequence[Any], met: list[UnreadableImage] | None = None) -> Any:
    """The batch of several keys: what the images' own `batch` makes of them, or the items put together.

    Args:
        images: with `batch`, as `PretrainImages`; or any data set.
        met: as of `PretrainImages.batch`; of other data sets, those have something in the place of an image that have `instead`.
    """
    if hasattr(images, "batch"):
        return images.batch(keys, met)
    if met is None:
        return default_collate([images[key] for key in keys])
    return default_collate([readable(images, key, met) for key in keys])


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` of the indices below ``length``, spread over them evenly, so that every class has its turn."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def readable_items(images: CentreCropped, keys: Sequence[int]) -> torch.Tensor:
    """uint8 [len(keys), channels, height, width]."""
    return batch_of(images, keys, [])
