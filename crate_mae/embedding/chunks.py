"""Chunks of features on disk, each of successive images, until all of them are there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from crate_mae.data.index_files import read_index, save_index
from crate_mae.data.unreadable import Unreadable
from crate_mae.files import remove, remove_unfinished


class Chunk(NamedTuple):
    """Features of successive images.

    Attributes:
        features: float32 [readable, width].
        indices: int64 [readable], the images' numbers.
        names: the images' names.
        unreadable: the images that cannot be read.
        batch_size: the batch size at the end of the chunk.
    """

    features: Tensor
    indices: Tensor
    names: list[str]
    unreadable: list[Unreadable]
    batch_size: int


_PASSING = ("vanished", "no permission", "read error")
"""Causes for an unreadable image that may be gone another day without any change of its file."""


def _may_mend(chunk: Chunk) -> bool:
    """Whether an image that the chunk leaves out may be readable by now."""
    return any(image.cause in _PASSING for image in chunk.unreadable)


class Summary(NamedTuple):
    """What is kept in memory of a chunk on disk: the length of its longest name, and the rest as in ``Chunk``."""

    longest_name: int
    unreadable: list[Unreadable]
    batch_size: int

    @classmethod
    def of(cls, chunk: Chunk) -> Summary:
        return cls(max(map(len, chunk.names), default=0), chunk.unreadable, chunk.batch_size)


class Chunks:
    """The chunks of a source, one file each in a folder. Chunks of other features, damaged ones, and those that lack an image
    which may be readable by now are deleted.

    Args:
        fingerprint: of all that the features depend on.
        images: the images of each chunk.

    Attributes:
        held: the whole chunks on disk, by number.
        discarded: whether there were any that had to be deleted.
    """

    def __init__(self, folder: Path, fingerprint: str, images: Sequence[range]) -> None:
        self.folder, self.images, self._fingerprint = folder, images, fingerprint
        remove_unfinished(folder)
        found = ((number, self.read(number)) for number in range(len(images)))  # one at a time in memory
        self.held = {number: Summary.of(chunk) for number, chunk in found if chunk is not None and not _may_mend(chunk)}
        useless = set(self._files()) - {self._path(number) for number in self.held}
        for path in useless:
            remove(path)
        self.discarded = bool(useless)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def unreadable(self) -> list[Unreadable]:
        """The unreadable images of all chunks on disk."""
        return [image for _, chunk in sorted(self.held.items()) for image in chunk.unreadable]

    def write(self, number: int, chunk: Chunk) -> None:
        """Add a chunk.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {"features": chunk.features.numpy(), "indices": chunk.indices.numpy()}
        words = {"names": chunk.names, "unreadable": chunk.unreadable, "batch_size": chunk.batch_size}
        save_index(self._path(number), arrays, {"made_of": self._made_of(number), "words": json.dumps(words)})
        self.held[number] = Summary.of(chunk)

    def read(self, number: int) -> Chunk | None:
        """The chunk; None where it is missing, damaged or of other features, and must be computed again."""
        found = read_index(self._path(number))
        if found is None or found[1].get("made_of") != self._made_of(number):
            return None
        features, indices = (torch.from_numpy(found[0][name]) for name in ("features", "indices"))
        words = json.loads(found[1]["words"])
        unreadable = [Unreadable(*each) for each in words["unreadable"]]
        return Chunk(features, indices, words["names"], unreadable, words["batch_size"])

    def remove(self) -> None:
        """Delete all chunks."""
        for path in self._files():
            remove(path)

    def _files(self) -> Iterator[Path]:
        return self.folder.glob(f"chunk_{'[0-9]' * 8}.safetensors")

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk_{number:08}.safetensors"

    def _made_of(self, number: int) -> str:
        images = self.images[number]
        return f"{self._fingerprint} {images.start}:{images.stop}"
