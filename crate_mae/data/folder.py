"""A folder of images, flat or sorted into class sub-folders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

FLOWERS = Path(__file__).parent / "flowers"
"""The photographs shipped with the package, in `train` and `val`; see SOURCE.md there for licence and origin."""

COLOUR_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class UnreadableImage(ValueError):
    """A file that has the name of an image and is none, or is cut short; `remedy` is what to do."""

    def __init__(self, path: Path, reason: str, remedy: str = "remove it, or put a readable one in its place") -> None:
        super().__init__(path, reason, remedy)  # all three, to be pickled between processes
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"cannot read the image {self.path} ({self.reason}); {self.remedy}"


class ImageFolder:
    """The images under a folder, at any depth, in the order of their sorted relative paths.

    The first folder below `root` is an image's class; images that lie in `root` itself have the class "". Hidden files
    and folders are passed over. A set whose decoded pixels fit in `cache_bytes` is decoded once and kept, because
    decoding a small set afresh each epoch costs more than training on it; a larger set is decoded image by image.

    Args:
        root: the folder.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA); images are converted to it.
        cache_bytes: the most memory that decoded images may take; 0 keeps none.

    Raises:
        FileNotFoundError: `root` is not a folder, or holds no image.
        ValueError: `channels` has no colour mode.
        UnreadableImage: a ValueError, when the image is decoded: its file is no readable image.
    """

    def __init__(self, root: str | Path, *, channels: int = 3, cache_bytes: int = 512 * 2**20) -> None:
        self.root = Path(root)
        if channels not in COLOUR_MODES:
            raise ValueError(f"channels: image files give {sorted(COLOUR_MODES)} channels, not {channels}")
        if not self.root.is_dir():
            raise FileNotFoundError(f"no such folder of images: {self.root}")
        self.channels = channels
        self.cache_bytes = cache_bytes
        self.paths = self._find_images()
        self.classes = sorted({self._class_name(path) for path in self.paths})
        class_index = {name: index for index, name in enumerate(self.classes)}
        self.labels = [class_index[self._class_name(path)] for path in self.paths]
        self._decoded = self._decode_all() if self._decoded_size() <= cache_bytes else None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """The image, upright (EXIF orientation applied), in the folder's colour mode."""
        return self._decoded[index] if self._decoded is not None else self._decode(self.paths[index])

    def subset(self, indices: Sequence[int]) -> ImageFolder:
        """The same folder restricted to `indices`, sharing what is decoded already."""
        part = object.__new__(ImageFolder)
        part.__dict__.update(self.__dict__)
        part.paths = [self.paths[i] for i in indices]
        part.labels = [self.labels[i] for i in indices]
        part._decoded = None if self._decoded is None else [self._decoded[i] for i in indices]
        return part

    def split(self, fraction: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
        """Two disjoint parts, the second holding `fraction` of the images, at least one, drawn with `seed`."""
        held_out = max(1, round(fraction * len(self)))
        if held_out >= len(self):
            raise ValueError(f"{self.root}: {len(self)} images leave none to train on after {held_out} for validation")
        order = np.random.default_rng(seed).permutation(len(self))
        return self.subset(sorted(order[held_out:])), self.subset(sorted(order[:held_out]))

    def fingerprint(self) -> str:
        """A digest of the relative paths: sets with one fingerprint hold the same files in the same order."""
        names = "\n".join(path.relative_to(self.root).as_posix() for path in self.paths)
        return hashlib.sha256(names.encode()).hexdigest()

    def _find_images(self) -> list[Path]:
        relative = (path.relative_to(self.root) for path in self.root.rglob("*"))
        images = [
            path
            for path in relative
            if path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)
        ]
        if not images:
            raise FileNotFoundError(f"no images under {self.root}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        return [self.root / path for path in sorted(images, key=Path.as_posix)]

    def _class_name(self, path: Path) -> str:
        parts = path.relative_to(self.root).parts
        return parts[0] if len(parts) > 1 else ""

    def _decoded_size(self) -> int:
        """Bytes of all decoded images, judged by the headers of up to 16 of them."""
        sample = self.paths[:: max(1, len(self.paths) // 16)][:16]
        total = 0
        for path in sample:
            with _opened(path) as image:
                total += image.width * image.height * self.channels
        return total * len(self.paths) // len(sample)

    def _decode_all(self) -> list[Image.Image]:
        return [self._decode(path) for path in self.paths]

    def _decode(self, path: Path) -> Image.Image:
        return read_image(path, self.channels)


def read_image(path: Path, channels: int) -> Image.Image:
    """The image in a file, upright (EXIF orientation applied), in the colour mode of so many channels.

    Raises:
        UnreadableImage: a ValueError: the file is no readable image.
    """
    with _opened(path) as image:
        try:
            return ImageOps.exif_transpose(image).convert(COLOUR_MODES[channels])
        except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
            raise UnreadableImage(path, str(error)) from error


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Exception as error:
        raise UnreadableImage(path, str(error)) from error
