"""Small sets of images, decoded once."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
from PIL import Image

from crate_mae.data.reading import whole
from crate_mae.data.source import Source, UnreadableImage, WrappedSource

_MOST_IMAGES = 5_000
"""The most images that a run decodes before it starts, which takes a second or two."""

_SAMPLED = 16
"""How many headers are read to judge whether a set is small."""


class DecodedImages(WrappedSource):
    """Images of another source, kept decoded, upright and in their colour mode."""

    def __init__(self, source: Source, images: list[Image.Image | UnreadableImage]) -> None:
        super().__init__(source)
        self._images = images

    def image(self, index: int) -> Image.Image:
        image = self._images[index]
        if isinstance(image, UnreadableImage):
            raise copy.copy(image)  # a copy: the kept one would hold the frames of everyone who met it
        return image


def decoded_if_small(source: Source, channels: int, most_bytes: int) -> Source:
    """The images decoded, if they are at most some thousands and need at most so much memory together; else the source.

    To decode a small set again each epoch costs more than to train on it. The headers of a few images tell a large set at once.
    If a set only looked small, decoding stops at the first image that needs more memory than allowed.
    """
    if len(source) > _MOST_IMAGES:
        return source
    expected = 0
    for index in np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int).tolist():
        with contextlib.suppress(UnreadableImage):
            expected += _bytes(source.image(index), channels)
    if expected * len(source) > most_bytes * min(_SAMPLED, len(source)):
        return source
    images: list[Image.Image | UnreadableImage] = []
    for index in range(len(source)):
        try:
            image = source.image(index)
            most_bytes -= _bytes(image, channels)
            if most_bytes < 0:
                return source
            images.append(whole(image, channels, source.name(index)))
        except UnreadableImage as error:
            images.append(error.with_traceback(None))
    return DecodedImages(source, images)


def _bytes(image: Image.Image, channels: int) -> int:
    """The memory of the decoded image: Pillow needs 1 or 4 bytes a pixel."""
    return image.width * image.height * (1 if channels == 1 else 4)
