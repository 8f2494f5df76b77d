"""Sources of images: their common interface, and parts of a source."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CAUSES = {
    "vanished": "no longer there, or its shard is not",
    "no permission": "may not be read",
    "no file": "a folder, a pipe or a device under the name of an image",
    "empty": "of no bytes",
    "no image": "in no format that Pillow opens",
    "truncated": "cut short",
    "too large": "of more pixels than Pillow takes for harmless, or of a side that no crop can be made of",
    "damaged": "whatever else its decoder cannot make sense of",
    "read error": "of the disk or the network",
}
"""Why an image cannot be read, and what each cause means."""


class MissingLibrary(ImportError):
    """A library that not everybody needs is not installed; the message says how it is."""


class UnreadableImage(ValueError):
    """An image that cannot be had.

    Attributes:
        name: where it is, as `Source.name` has it.
        cause: one of `CAUSES`.
        reason: what was said of it by who tried to read it.
        remedy: what to do.
    """

    def __init__(
        self, name: object, cause: str, reason: str, remedy: str = "remove it, or put a readable one in its place"
    ) -> None:
        reason = " ".join(reason.split())
        super().__init__(str(name), cause, reason, remedy)  # all of them, to be pickled between processes
        self.name, self.cause, self.reason, self.remedy = str(name), cause, reason, remedy

    def __str__(self) -> str:
        return f"cannot read the image {self.name} ({self.cause}: {self.reason}); {self.remedy}"


class Source(ABC):
    """Images by their number, 0 to len - 1, the same each time that it is opened.

    A source is handed to worker processes, by fork or pickled, and read by many threads: it holds no open file that would not
    survive that.

    Attributes:
        classes: names of the classes, by their numbers; [""] where there are none.
    """

    classes: Sequence[str] = ("",)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image as it is stored: its header is read, and its pixels need not be, so that a decoder can be told what is
        wanted of them (`reading`).

        Raises:
            UnreadableImage: it cannot be had, or it is none.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image is, for people: a path, or a shard and a name in it."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest: sources with one fingerprint have the same images in the same order, as far as names tell."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [len]: the number of each image's class."""
        return np.zeros(len(self), dtype=np.int32)

    def remarks(self) -> list[str]:
        """Remarks for the user, in short phrases: what was left out, and why; the memory of its index."""
        return []

    def files(self) -> Iterable[Path]:
        """The files that the images lie in, in an order; none where `fingerprint` tells by what is in them."""
        return ()

    def epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The images that an epoch of a run with this seed visits, in order: a function of the two numbers alone.

        Returns:
            uint32 [len] and uint32 [len]: of each visit the pass over the images that it belongs to, which together with the
            image decides how it is cropped, and the image's number. Here an epoch is a pass, and visits each image once.
        """
        indices = shuffled(len(self), np.random.default_rng((seed, epoch)))
        return np.broadcast_to(np.uint32(epoch), len(self)), indices

    def split(self, fraction: float, seed: int) -> tuple[Source, Source]:
        """Two disjoint parts, the second holding `fraction` of the images, at least one, drawn with `seed`.

        Raises:
            ValueError: nothing would be left to train on.
        """
        held_out = max(1, round(fraction * len(self)))
        if held_out >= len(self):
            raise ValueError(f"{len(self)} images leave none to train on after {held_out} for validation")
        order = shuffled(len(self), np.random.default_rng(seed))
        return Subset(self, np.sort(order[held_out:])), Subset(self, np.sort(order[:held_out]))


class Name:
    """The name of an image of a source, which errors alone need, and which takes a while to make up."""

    def __init__(self, source: Source, index: int) -> None:
        self._source, self._index = source, index

    def __str__(self) -> str:
        return self._source.name(self._index)


class WrappedSource(Source):
    """The images of another source; subclasses override what differs."""

    def __init__(self, source: Source) -> None:
        self.source, self.classes = source, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Image.Image:
        return self.source.image(index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels

    def remarks(self) -> list[str]:
        return self.source.remarks()

    def files(self) -> Iterable[Path]:
        return self.source.files()

    def epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return self.source.epoch(seed, epoch)


class Subset(WrappedSource):
    """Some images of a source; an epoch visits each once, also where an epoch of the source itself would not.

    Args:
        source: of all of them.
        indices: their numbers in it; kept as they are, 4 bytes each.
    """

    def __init__(self, source: Source, indices: np.ndarray | Sequence[int]) -> None:
        super().__init__(source)
        self.indices = np.asarray(indices, dtype=np.uint32)

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint().encode() + self.indices.tobytes()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    def epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return Source.epoch(self, seed, epoch)


def shuffled(count: int, rng: np.random.Generator) -> np.ndarray:
    """uint32 [count]: the numbers 0 to count - 1 in an order drawn with `rng`."""
    order = np.arange(count, dtype=np.uint32)
    rng.shuffle(order)
    return order
