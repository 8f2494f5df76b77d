"""A folder of images, flat or sorted into class sub-folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from crate_mae.data.listing import list_images, memory_remarks
from crate_mae.data.paths import PathList, differing, printable
from crate_mae.data.reading import IMAGE_SUFFIXES, open_file
from crate_mae.data.source import Source

FLOWERS = Path(__file__).parent / "flowers"
"""The photographs shipped with the package, in `train` and `val`; see SOURCE.md there for licence and origin."""


class ImageFolder(Source):
    """The images under a folder, at any depth, in the order of their relative paths.

    They are sorted by the bytes of their paths, with "/" between the parts; for UTF-8 names that is the order of the characters.
    The first folder below `root` is an image's class; images directly in `root` have the class "". Hidden files and folders are
    skipped. Links are followed, to each folder once (`listing` says by which way).

    Args:
        root: the folder.
        kept: a list of the folder's images, written by `save_list`; the folder is then not listed.

    Attributes:
        root: the folder.
        classes: names, as text that can be printed, in the order of their bytes.

    Raises:
        FileNotFoundError: `root` is not a folder, or holds no image; `kept` is not there.
        ValueError: `kept` is damaged, or something else.
    """

    def __init__(self, root: str | Path, *, kept: Path | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no such folder of images: {self.root}")
        self._images, self._remarks = list_images(self.root) if kept is None else (PathList.load(kept), [])
        if not len(self):
            found = f" ({'; '.join(self._remarks)})" if self._remarks else ""
            raise FileNotFoundError(
                f"no images under {self.root}{found}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self.classes = [printable(name) for name in self._images.classes]

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        path = self._path(index)
        return open_file(os.fsdecode(path), printable(path))

    def name(self, index: int) -> str:
        """The image's path as printable text: bytes that are not UTF-8 and unprintable characters become backslash escapes."""
        return printable(self._path(index))

    def path(self, index: int) -> Path:
        return Path(os.fsdecode(self._path(index)))

    def fingerprint(self) -> str:
        """The SHA-256 of the relative paths in their order, each ended by a NUL byte."""
        return self._images.fingerprint

    @property
    def labels(self) -> np.ndarray:
        return self._images.labels

    def remarks(self) -> list[str]:
        return self._remarks + memory_remarks(self._images)

    def files(self) -> Iterable[Path]:
        return (self.path(index) for index in range(len(self)))

    def save_list(self, path: Path) -> None:
        """Write the images' relative paths to a file, for `kept`.

        Raises:
            OSError: it cannot be written.
        """
        self._images.save(path)

    def _path(self, index: int) -> bytes:
        return os.path.join(os.fsencode(self.root), self._images[index])


def compare(kept: ImageFolder, now: ImageFolder) -> tuple[int, int]:
    """How many images of a kept list are gone, and how many are new, by their relative paths."""
    return differing(kept._images, now._images)
