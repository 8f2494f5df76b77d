"""Images in files that lists of the data set name, with the labels that the lists give them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from crate_mae.data.paths import printable
from crate_mae.data.reading import open_file
from crate_mae.data.source import Source


class ListedImages(Source):
    """Image files by name. Whether they are there is found when they are read.

    Args:
        folder: that they lie in.
        files: their names in it.
        labels: int [len(files)].
        classes: names, by label.
        about: a remark.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(
        self, folder: Path, files: Sequence[str], labels: Sequence[int] | np.ndarray, classes: Sequence[str], about: str
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder of images: {folder}")
        self.folder, self.classes, self._names = folder, list(classes), list(files)
        self._labels, self._about = np.asarray(labels, dtype=np.int32), about

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Image.Image:
        return open_file(self._path(index), self.name(index))

    def name(self, index: int) -> str:
        return printable(os.fsencode(self._path(index)))

    def fingerprint(self) -> str:
        """The SHA-256 of the files' names in their order, each ended by a NUL byte."""
        return hashlib.sha256(b"".join(os.fsencode(name) + b"\0" for name in self._names)).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        return self._labels

    def remarks(self) -> list[str]:
        return [self._about]

    def files(self) -> Iterable[Path]:
        return (self.folder / name for name in self._names)

    def _path(self, index: int) -> Path:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.folder / self._names[index]
