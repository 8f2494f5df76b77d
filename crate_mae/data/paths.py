"""The relative paths of very many images in little memory: bytes and offsets, and no object for each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from crate_mae.data.index_files import read_index, save_index

_FORMAT = "list of images 1"
_PIECE = 2**16
"""Paths that are made at once, where all are wanted in turn."""


class Texts:
    """Texts without NUL bytes, one after the other, each ended by one.

    Args:
        blob: uint8 [bytes]: all of them.
    """

    def __init__(self, blob: np.ndarray) -> None:
        self.blob = blob
        self.ends = np.flatnonzero(blob == 0).astype(np.uint32 if len(blob) < 2**32 else np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.between(index, index + 1)[:-1]

    def between(self, first: int, stop: int) -> bytes:
        """The texts number `first` to `stop` - 1, each ended by a NUL byte."""
        start = int(self.ends[first - 1]) + 1 if first else 0
        return self.blob[start : int(self.ends[stop - 1]) + 1].tobytes() if first < stop else b""

    def __reduce__(self) -> tuple[type[Texts], tuple[np.ndarray]]:
        return Texts, (self.blob,)

    @property
    def nbytes(self) -> int:
        return self.blob.nbytes + self.ends.nbytes


class PathList:
    """Paths relative to a folder, as bytes and with "/" between their parts, in the order of those bytes.

    Names that follow one another and lie in one folder are a run, and are kept without it. An image takes its name, 5 bytes, and
    its share of a run: of its folder's path and 13 bytes. (Of names past 4 GiB together each takes 9.)

    Args:
        names: of the files, without their folders.
        folders: of each run.
        counts: int64 [runs]: names in each run, at least one.
    """

    def __init__(self, names: Texts, folders: Texts, counts: np.ndarray) -> None:
        self.names, self.folders = names, folders
        self._firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @classmethod
    def of_runs(cls, runs: Iterable[tuple[bytes, bytes]]) -> PathList:
        """The list of runs of names in one folder: pairs of the folder and its names, each ended by a NUL byte."""
        folders, names = tuple(zip(*runs, strict=True)) or ((), ())
        counts = np.array([text.count(b"\0") for text in names], dtype=np.int64)
        return cls(_texts(b"".join(names)), _texts(b"".join(folder + b"\0" for folder in folders)), counts)

    @classmethod
    def load(cls, path: Path) -> PathList:
        """The list in a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or something else.
        """
        with open(path, "rb"):  # for the error of a file that cannot be read
            found = read_index(path)
        if found is None or found[1].get("format") != _FORMAT:
            raise ValueError(f"{path}: a damaged list of images, or something else")
        arrays, _ = found
        return cls(Texts(arrays["names"]), Texts(arrays["folders"]), arrays["counts"])

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all.

        Raises:
            OSError: that cannot be.
        """
        arrays = {"names": self.names.blob, "folders": self.folders.blob, "counts": np.diff(self._firsts)}
        save_index(path, arrays, {"format": _FORMAT})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        return joined(self.folders[self._run_of(index)], self.names[index])

    def texts(self, first: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The paths number `first` to `stop` - 1 in their order, each ended by a NUL byte, many at once."""
        stop = len(self) if stop is None else min(stop, len(self))
        run = self._run_of(first)
        while first < stop:
            end = min(stop, first + _PIECE, int(self._firsts[run + 1]))
            text, folder = self.names.between(first, end), self.folders[run]
            if folder:
                text = folder + b"/" + text[:-1].replace(b"\0", b"\0" + folder + b"/") + b"\0"
            yield text
            run += int(end == self._firsts[run + 1])
            first = end

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the paths in their order, each ended by a NUL byte, which no path has in it."""
        digest = hashlib.sha256()
        for text in self.texts():
            digest.update(text)
        return digest.hexdigest()

    @property
    def classes(self) -> list[bytes]:
        """The first folders on the paths, sorted; b"" is that of paths without one."""
        return self._classes[0]

    @property
    def labels(self) -> np.ndarray:
        """int32 [len]: the number of each path's class."""
        return np.repeat(self._classes[1], np.diff(self._firsts))

    @cached_property
    def _classes(self) -> tuple[list[bytes], np.ndarray]:
        """And int32 [runs], the class of each run."""
        tops = [self.folders[run].partition(b"/")[0] for run in range(len(self.folders))]
        classes = sorted(set(tops))
        number = {top: index for index, top in enumerate(classes)}
        return classes, np.array([number[top] for top in tops], dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.names.nbytes + self.folders.nbytes + self._firsts.nbytes

    def _run_of(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1


def differing(before: PathList, after: PathList) -> tuple[int, int]:
    """How many paths are in the first list alone, and how many in the second alone, in memory that does not grow with them."""
    gone = new = i = j = 0
    while i < len(before) and j < len(after):
        texts = b"".join(before.texts(i, i + _PIECE)), b"".join(after.texts(j, j + _PIECE))
        some, others = (text.split(b"\0")[:-1] for text in texts)
        if some[-1] != others[-1]:  # what lies after the lower of the two ends may be among the next of the other list
            end = min(some[-1], others[-1])
            some, others = [path for path in some if path <= end], [path for path in others if path <= end]
        if some != others:
            shared = len(set(some).intersection(others))
            gone, new = gone + len(some) - shared, new + len(others) - shared
        i, j = i + len(some), j + len(others)
    return gone + len(before) - i, new + len(after) - j


def joined(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name


def printable(path: bytes) -> str:
    """A path as text for people, on one line and in UTF-8 whatever is in it: the rest as backslash escapes."""
    text = path.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _texts(content: bytes) -> Texts:
    return Texts(np.frombuffer(content, dtype=np.uint8))
