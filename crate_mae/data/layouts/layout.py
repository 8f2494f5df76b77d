"""Layouts: which files a published data set has on a disk, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crate_mae.data.source import Source


@dataclass(frozen=True)
class Layout:
    """How a data set lies on a disk when its archive has been unpacked.

    Attributes:
        title: of the data set, for people.
        folder: the name of its folder as it is distributed, which may be looked for one level down.
        marks: files, relative to the folder, that are all there where it is this one.
        parts: of the data set, "train" first, with the number of images that each has as it was published.
        read: the images of some parts, one part after the other, of the set in a folder. It raises OSError for a file that is
            missing and ValueError for one that is damaged, by its name.
    """

    title: str
    folder: str
    marks: tuple[str, ...]
    parts: Mapping[str, int]
    read: Callable[[Path, Sequence[str]], Source]

    def lies_in(self, folder: Path) -> bool:
        return all((folder / mark).is_file() for mark in self.marks)

    def about(self, parts: Sequence[str], images: int) -> str:
        """A remark for the user: the data set and parts of the images, and how many of the published images there are."""
        published = sum(self.parts[part] for part in parts)
        held = (
            f"all {images:,} images"
            if images == published
            else f"{images:,} images, where {published:,} were published"
        )
        return f"{self.title}, {' and '.join(parts)}: {held}"
