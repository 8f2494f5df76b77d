"""Small sets of images, decoded once."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
from PIL import Image

from crate_mae.data.reading import whole
from crate_mae.data.source import Source, UnreadableImage, WrappedSource

_MOST_IMAGES = 5_000
"""That a run decodes before it starts, which takes a second or two."""

_SAMPLED = 16
"""Headers by which it is judged whether a set could be small."""


class DecodedImages(WrappedSource):
    """Images of another source, kept decoded, upright and in their colour mode."""

    def __init__(self, source: Source, images: list[Image.Image | UnreadableImage]) -> None:
        super().__init__(source)
        self._images = images

    def image(self, index: int) -> Image.Image:
        image = self._images[index]
        if isinstance(image, UnreadableImage):
            raise copy.copy(image)  # not the one that is kept, which would keep who has met it
        return image


def decoded_if_small(source: Source, channels: int, most_bytes: int) -> Source:
    """The images decoded, where they are no more than some thousands and take at most so much memory together; else the source.

    Decoding a small set afresh each epoch costs more than training on it. A large one is told by the headers of a few images; one
    that looked small and is not, when the next image would be too much.
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
    """What the image takes decoded: as Pillow keeps it, 1 byte a pixel or 4."""
    return image.width * image.height * (1 if channels == 1 else 4)
