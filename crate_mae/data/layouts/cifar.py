"""CIFAR-10 and CIFAR-100, in their python version and their binary version.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html tells
how the files are laid out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from crate_mae.data.layouts.layout import Layout
from crate_mae.data.layouts.pickled import read_pickle
from crate_mae.data.source import Source

_SIDE = 32
_BYTES = 3 * _SIDE * _SIDE
"""Bytes of an image: its red, green and blue planes, each row after row."""


@dataclass(frozen=True)
class Version:
    """One way to store a CIFAR.

    Attributes:
        files: of each part.
        read: of a file the pixels, uint8 [images, 3072], and the labels, whole numbers [images].
        names: of the classes, by their labels.
        meta: the file that has them.
    """

    files: Mapping[str, tuple[str, ...]]
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
    names: Callable[[Path], list[str]]
    meta: str


class CifarImages(Source):
    """The 32 x 32 images of some parts of a CIFAR, in the order of its files, with their fine labels.

    Pixels of the binary version stay in their files, which are mapped into memory; those of the python version are read, 3,072
    bytes each, and forked processes share them. Pickled, it is the place alone, and reads the files again.

    Args:
        number: of the layout among `CIFARS`.
        root: the folder that holds the files.
        parts: "train", "test".

    Raises:
        OSError: a file is not there, or cannot be read.
        ValueError: one is damaged, cut short, or of another kind; a label has no class; there is no image.
    """

    def __init__(self, number: int, root: Path, parts: Sequence[str]) -> None:
        self._made_of = number, root, tuple(parts)
        layout, version = CIFARS[number], _VERSIONS[number]
        self.classes = _class_names(root / version.meta, version.names)
        self._paths = [root / name for part in parts for name in version.files[part]]
        self._pixels, labels = [], []
        for path in self._paths:
            pixels, its_labels = version.read(path)
            self._pixels.append(pixels)
            labels.append(_checked(its_labels, len(pixels), len(self.classes), path))
        self._labels = np.concatenate(labels)
        self._firsts = np.cumsum([0, *map(len, self._pixels)])
        self._about = layout.about(parts, len(self))

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> Image.Image:
        file, row = self._place(index)
        planes = self._pixels[file][row].reshape(3, _SIDE, _SIDE)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def name(self, index: int) -> str:
        file, row = self._place(index)
        return f"{self._paths[file]}#{row}"

    def fingerprint(self) -> str:
        """The SHA-256 of the pixels: the same in both versions."""
        digest = hashlib.sha256()
        for pixels in self._pixels:
            for first in range(0, len(pixels), 1024):
                digest.update(np.ascontiguousarray(pixels[first : first + 1024]).data)
        return digest.hexdigest()

    @property
    def labels(self) -> np.ndarray:
        return self._labels

    def remarks(self) -> list[str]:
        return [self._about]

    def __reduce__(self) -> tuple[type[CifarImages], tuple[int, Path, tuple[str, ...]]]:
        return CifarImages, self._made_of

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the file, and that of the image in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        file = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return file, index - int(self._firsts[file])


def _of_pickle(path: Path, *, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the python version."""
    held = read_pickle(path)
    pixels, numbers = held.get("data"), held.get(labels)
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(pixels), _BYTES)):
        shape = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{path}: data: expected uint8 [images, {_BYTES}], got {shape}")
    if isinstance(numbers, list) and not all(type(number) is int for number in numbers):
        numbers = None
    if not isinstance(numbers, list | np.ndarray):
        raise ValueError(f"{path}: {labels}: expected a list of whole numbers, and there is none")
    return pixels, np.array(numbers)


def _of_binary(path: Path, *, before: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the binary version: rows of so many labels before the pixels, the last of which counts."""
    row, size = before + _BYTES, path.stat().st_size
    if not size or size % row:
        raise ValueError(
            f"{path}: expected a whole number of images of {row:,} bytes each, got {size:,} bytes; get it again"
        )
    rows = np.memmap(path, np.uint8, "r", shape=(size // row, row))
    return rows[:, before:], np.array(rows[:, before - 1])


def _names_of_pickle(path: Path, *, key: str) -> list[str]:
    names = read_pickle(path).get(key)
    if not isinstance(names, list):
        raise ValueError(f"{path}: {key}: expected a list of names, got {type(names).__name__}")
    return [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]


def _names_of_text(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _class_names(path: Path, read: Callable[[Path], list[str]]) -> list[str]:
    names = read(path)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: expected names of classes that can be told apart, got {names}")
    return names


def _checked(labels: np.ndarray, images: int, classes: int, path: Path) -> np.ndarray:
    """int32 [images]: the labels, one for each image and of a class each."""
    if labels.shape != (images,) or not images:
        raise ValueError(f"{path}: expected a label for each image, got {labels.size:,} for {images:,} images")
    if (strange := np.flatnonzero((labels < 0) | (labels >= classes))).size:
        raise ValueError(
            f"{path}: expected labels of 0 to {classes - 1}, got {labels[strange[0]]} for image {strange[0]}"
        )
    return labels.astype(np.int32)


_VERSIONS = (
    Version(
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        partial(_of_pickle, labels="labels"),
        partial(_names_of_pickle, key="label_names"),
        "batches.meta",
    ),
    Version(
        {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)},
        partial(_of_binary, before=1),
        _names_of_text,
        "batches.meta.txt",
    ),
    Version(
        {"train": ("train",), "test": ("test",)},
        partial(_of_pickle, labels="fine_labels"),
        partial(_names_of_pickle, key="fine_label_names"),
        "meta",
    ),
    Version(
        {"train": ("train.bin",), "test": ("test.bin",)},
        partial(_of_binary, before=2),  # the coarse label, then the fine one
        _names_of_text,
        "fine_label_names.txt",
    ),
)

CIFARS = tuple(
    Layout(title, folder, marks, {"train": 50_000, "test": 10_000}, partial(CifarImages, number))
    for number, (title, folder, marks) in enumerate([
        ("CIFAR-10 (python version)", "cifar-10-batches-py", ("data_batch_1",)),
        ("CIFAR-10 (binary version)", "cifar-10-batches-bin", ("data_batch_1.bin",)),
        ("CIFAR-100 (python version)", "cifar-100-python", ("train", "meta")),
        ("CIFAR-100 (binary version)", "cifar-100-binary", ("train.bin", "fine_label_names.txt")),
    ])
)  # fmt: skip
"""The four of them."""
