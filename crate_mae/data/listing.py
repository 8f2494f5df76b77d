"""The images under a folder, found by many threads at once. The listing is kept, so that the next one only looks for changes.

The content of each folder is kept with its device, inode and times. The next walk goes to the same folders, but does not list one
that has not changed since: the result is that of a fresh listing.

A folder that can be reached in several ways, by links, is taken once: by the way with the fewest links; of these by the one with
the fewest folders after the last link; of these by the first in the order of their paths.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from crate_mae.data.index_files import cache_file, read_index, write_index
from crate_mae.data.paths import PathList, joined, printable
from crate_mae.data.reading import IMAGE_SUFFIXES

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 32  # a network file system answers many requests at once as fast as one
_SETTLED_NS = 2 * 10**9
"""A folder that changed less than this before it was listed may change again with the same time, as file systems round times."""
_WORTH_KEEPING = 1000
"""Images and folders from which a listing is kept; fewer are listed as fast as the file is read."""
_LARGE = 100_000
"""Above this number of images a remark tells the memory of their index."""
_SUFFIXES = frozenset(suffix[1:].encode() for suffix in IMAGE_SUFFIXES)


class _Folder(NamedTuple):
    """The content of a folder, without hidden names. Names are sorted, and a NUL byte ends each of them."""

    identity: tuple[int, int]  # device and inode
    times: tuple[int, int]  # of its last change, and of the last change of its permissions or the like, in ns
    listed: int  # when it was, in ns
    images: bytes  # names of files that have an image's suffix
    folders: bytes
    links: bytes
    special: bytes  # pipes, sockets and devices that have an image's suffix
    others: bytes  # of the other files, suffixes and how many have them


_TEXTS = ("images", "folders", "links", "special", "others")


class Listing(NamedTuple):
    images: PathList
    remarks: list[str]


def list_images(root: Path) -> Listing:
    """The images under a folder at any depth, without hidden ones, and remarks for the user."""
    place = cache_file("folder", os.path.realpath(root))
    with (
        tqdm(desc=f"listing {root}", unit=" images", delay=2, disable=None, leave=False) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        walk = _Walk(os.fsencode(root), _Kept(place), pool, bar)
        walk.run()
    images = PathList.of_runs(_runs(walk.found))
    if walk.anew and len(images) + len(walk.folders) >= _WORTH_KEEPING:
        _keep(place, walk.folders)
    return Listing(images, walk.remarks())


def memory_remarks(images: PathList) -> list[str]:
    if len(images) <= _LARGE:
        return []
    return [f"index of {len(images):,} images: {images.nbytes / 2**20:,.0f} MiB"]


def holds_images(path: Path) -> bool:
    """Whether a path is an image by its name, or a folder with an image at any depth; stops at the first image."""
    if not path.is_dir():
        return _is_image(os.fsencode(path.name)) and path.is_file()
    seen, left = set(), [os.fsencode(path)]
    while left:
        folder = left.pop()
        try:
            identity = _state(folder)[0]
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        left.append(entry.path)
                    elif _is_image(entry.name) and entry.is_file():
                        return True
        except OSError:
            continue
    return False


class _Walk:
    """A walk through all folders under a root, level by level.

    Attributes:
        found: for each folder its path, its images and the names of the folders in it.
        folders: the content of each folder.
        anew: whether any folder was listed, and not taken from the kept listing.
    """

    def __init__(self, root: bytes, kept: _Kept, pool: ThreadPoolExecutor, bar: tqdm[Any]) -> None:
        self.root, self.kept, self.pool, self.bar = root, kept, pool, bar
        self.counting = threading.Lock()
        self.found: list[tuple[bytes, bytes, list[bytes]]] = []
        self.folders: list[_Folder] = []
        self.anew = False
        self.closed: list[bytes] = []
        self.met_again: list[bytes] = []
        self.broken_links: list[bytes] = []
        self.special: list[bytes] = []
        self.others: Counter[bytes] = Counter()

    def run(self) -> None:
        seen: set[tuple[int, int]] = set()
        level, linked = [b""], []
        while level:
            now = time.time_ns()
            level.sort()
            taken: list[tuple[bytes, tuple[int, int], tuple[int, int], int]] = []
            for path, state in zip(level, self.each(self.state, level), strict=True):
                if state is None:
                    self.closed.append(path)
                elif state[0] in seen:
                    self.met_again.append(path)
                else:
                    seen.add(state[0])
                    taken.append((path, *state, now))
            listed = self.each(lambda item: self.look(*item), taken)
            inside, links = self.take([path for path, *_ in taken], listed)
            linked += links
            level, linked = (inside, linked) if inside else (linked, [])

    def take(self, paths: Sequence[bytes], listed: Sequence[_Folder | None]) -> tuple[list[bytes], list[bytes]]:
        """Record the content of folders; returns the paths of the folders in them, and of the links to folders."""
        links = [
            (path, name) for path, folder in zip(paths, listed, strict=True) if folder for name in _split(folder.links)
        ]
        kinds = iter(zip(links, self.each(lambda link: self.kind(joined(*link)), links), strict=True))
        inside: list[bytes] = []
        linked: list[bytes] = []
        for path, folder in zip(paths, listed, strict=True):
            if folder is None:
                self.closed.append(path)
                continue
            self.folders.append(folder)
            self.special += (joined(path, name) for name in _split(folder.special))
            for text in _split(folder.others):
                suffix, _, count = text.rpartition(b" ")
                self.others[suffix] += int(count)
            images, folders = folder.images, _split(folder.folders)
            inside += (joined(path, name) for name in folders)
            linked_images: list[bytes] = []
            for (_, name), kind in islice(kinds, folder.links.count(b"\0")):
                if kind is None:
                    self.broken_links.append(joined(path, name))
                elif stat.S_ISDIR(kind):
                    linked.append(joined(path, name))
                    folders.append(name)
                elif stat.S_ISREG(kind):
                    if _is_image(name):
                        linked_images.append(name)
                    else:
                        self.others[_suffix(name)] += 1
                elif _is_image(name):
                    self.special.append(joined(path, name))
            if linked_images:
                images = _ended(sorted(_split(images) + linked_images))
            if images:
                self.found.append((path, images, folders))
        return inside, linked

    def look(self, path: bytes, identity: tuple[int, int], times: tuple[int, int], now: int) -> _Folder | None:
        """The content of a folder; None where it cannot be listed."""
        folder = self.kept.get(identity, times)
        if folder is not None:
            self.count(folder.images.count(b"\0"))
            return folder
        try:
            folder = _listed(self.under_root(path), identity, times, now, self.count)
        except OSError:
            return None
        self.anew = True
        return folder

    def state(self, path: bytes) -> tuple[tuple[int, int], tuple[int, int]] | None:
        try:
            return _state(self.under_root(path))
        except OSError:
            return None

    def kind(self, path: bytes) -> int | None:
        """The mode of a link's target; None where the link cannot be followed."""
        try:
            return os.stat(self.under_root(path)).st_mode
        except OSError:
            return None

    def under_root(self, path: bytes) -> bytes:
        return os.path.join(self.root, path) if path else self.root

    def each(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The results of work on each item, in their order, by many threads."""
        size = max(1, min(256, len(items) // (4 * _THREADS)))
        batches = (items[first : first + size] for first in range(0, len(items), size))
        return list(chain.from_iterable(self.pool.map(lambda batch: [work(item) for item in batch], batches)))

    def count(self, images: int) -> None:
        with self.counting:
            self.bar.update(images)

    def remarks(self) -> list[str]:
        named = {
            "folders that cannot be listed": self.closed,
            "folders met again by a link or a loop": self.met_again,
            "links that lead nowhere": self.broken_links,
            "pipes, sockets or devices named like images": self.special,
        }
        said = [f"{what} ({len(paths):,}): {_some(sorted(paths))}" for what, paths in named.items() if paths]
        return said + ([f"left out {_by_suffix(self.others)}"] if self.others else [])


def _listed(
    path: bytes, identity: tuple[int, int], times: tuple[int, int], now: int, count: Callable[[int], None]
) -> _Folder:
    images: list[bytes] = []
    folders: list[bytes] = []
    links: list[bytes] = []
    special: list[bytes] = []
    others: Counter[bytes] = Counter()
    with os.scandir(path) as entries:
        while some := list(islice(entries, 4096)):
            before = len(images)
            for entry in some:
                name = entry.name
                if name.startswith(b"."):
                    continue
                if entry.is_file(follow_symlinks=False):
                    if _is_image(name):
                        images.append(name)
                    else:
                        others[_suffix(name)] += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_symlink():
                    links.append(name)
                elif _is_image(name):
                    special.append(name)
            count(len(images) - before)
    counts = [b"%s %d" % item for item in others.items()]
    texts = (_ended(sorted(names)) for names in (images, folders, links, special, counts))
    return _Folder(identity, times, now, *texts)


def _state(path: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """A folder's identity and times, as `_Folder` has them."""
    found = os.stat(path)
    return (found.st_dev, found.st_ino % 2**64), (found.st_mtime_ns, found.st_ctime_ns)


def _runs(found: Iterable[tuple[bytes, bytes, list[bytes]]]) -> Iterator[tuple[bytes, bytes]]:
    """The images in the order of their paths, as runs of names in one folder.

    In this order the folders in a folder lie among its images, each at its name with a "/" after it. The images of a folder are
    therefore cut into runs at its subfolders. Sorted by their first paths, these runs are in the order of all paths.
    """
    runs: list[tuple[bytes, bytes, bytes]] = []
    for path, images, folders in found:
        pieces = [images]
        if folders:
            names = _split(images)
            cuts = sorted({bisect_left(names, folder + b"/") for folder in folders} | {0, len(names)})
            pieces = [_ended(names[first:stop]) for first, stop in pairwise(cuts)]
        runs += ((joined(path, piece[: piece.index(b"\0")]), path, piece) for piece in pieces)
    return ((path, piece) for _, path, piece in sorted(runs))


class _Kept:
    """The kept content of folders, by their identity."""

    def __init__(self, place: Path) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.numbers: dict[tuple[int, int], int] = {}
        found = read_index(place)
        if found is not None and found[1] == _about():
            self.arrays = found[0]
            self.numbers = {tuple(row): number for number, row in enumerate(self.arrays["identity"].tolist())}
            self.bounds = {name: np.concatenate([[0], np.cumsum(self.arrays[f"{name}_size"])]) for name in _TEXTS}

    def get(self, identity: tuple[int, int], times: tuple[int, int]) -> _Folder | None:
        """The kept content of a folder; None where there is none, or where it may have changed since."""
        number = self.numbers.get(identity)
        if number is None:
            return None
        *kept_times, listed = self.arrays["times"][number].tolist()
        if tuple(kept_times) != times or max(times) > listed - _SETTLED_NS:
            return None
        bounds = ((name, *self.bounds[name][number : number + 2]) for name in _TEXTS)
        return _Folder(
            identity, times, listed, *(self.arrays[name][start:end].tobytes() for name, start, end in bounds)
        )


def _keep(place: Path, folders: Sequence[_Folder]) -> None:
    arrays = {
        "identity": np.array([folder.identity for folder in folders], dtype=np.uint64),
        "times": np.array([(*folder.times, folder.listed) for folder in folders], dtype=np.int64),
    }
    for name in _TEXTS:
        texts = [getattr(folder, name) for folder in folders]
        arrays[name] = np.frombuffer(b"".join(texts), dtype=np.uint8)
        arrays[f"{name}_size"] = np.array([len(text) for text in texts], dtype=np.int64)
    write_index(place, arrays, _about())


def _about() -> dict[str, str]:
    return {"format": "folders 1", "suffixes": " ".join(sorted(IMAGE_SUFFIXES))}


def _is_image(name: bytes) -> bool:
    return name.rpartition(b".")[2].lower() in _SUFFIXES and b"." in name


def _suffix(name: bytes) -> bytes:
    """The suffix after the last dot, in lower case; b"" where it is no short word."""
    suffix = name.rpartition(b".")[2].lower() if b"." in name else b""
    return suffix if len(suffix) <= 10 and suffix.isalnum() else b""


def _by_suffix(others: Counter[bytes]) -> str:
    """Counts by suffix, such as "3 .txt, 1 .xcf files"; at most three suffixes are named."""
    ranked = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    said = ", ".join(
        f"{count:,} .{suffix.decode()}" if suffix else f"{count:,} suffixless" for suffix, count in ranked[:3]
    )
    left = sum(count for _, count in ranked[3:])
    return f"{said} files{_and_others(left)}"


def _some(paths: Sequence[bytes]) -> str:
    said = ", ".join(printable(path) or "." for path in paths[:3])
    return said + _and_others(len(paths) - 3)


def _and_others(count: int) -> str:
    return f" and {count:,} other{'s' * (count > 1)}" if count > 0 else ""


def _split(texts: bytes) -> list[bytes]:
    return texts.split(b"\0")[:-1]


def _ended(texts: Sequence[bytes]) -> bytes:
    return b"".join(text + b"\0" for text in texts)
