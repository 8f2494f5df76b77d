"""Tar shards of images, in the naming and layout of WebDataset, read through an index of where each image lies.

A shard is an uncompressed tar. Its images are the members with an image's suffix, in their order, and then hard links to such.
The class of an image is what a `.cls` member of the same key says, a whole number, or else the first folder of its name. The
index of a shard is made of the headers of its members, and kept: beside the shard by `crate-mae pack`, else in the user's cache.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import stat
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from crate_mae.data.paths import printable
from crate_mae.data.reading import errors_named, open_image
from crate_mae.data.shard_index import ShardIndex, scanned, shard_index
from crate_mae.data.source import Name, Source, UnreadableImage

_MOST_SHARDS = 1_000_000

_MOST_OPEN = 64
"""Descriptors a process keeps."""


_MOST_REMARKS = 20
"""On shards that end too early, one each."""


def shard_paths(pattern: str) -> list[Path]:
    """The shards that a pattern names, whether they are there or not, in their order.

    Args:
        pattern: `name-{000000..000099}.tar`, where each range of numbers in braces keeps its zeros; a folder, of which all .tar
            files are meant; or one .tar.

    Raises:
        FileNotFoundError: the folder holds no shard.
        ValueError: the pattern has no such range, or far too many.
    """
    path = Path(pattern)
    if path.is_dir():
        found = sorted(each for each in path.glob("*.tar") if not each.name.startswith(".") and not each.is_dir())
        if not found:
            raise FileNotFoundError(f"no shards in {path}; looked for *.tar")
        return found
    if path.exists():
        return [path]
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)  # text, first, last, text, ...
    if "{" in "".join(pieces[::3]) or "}" in "".join(pieces[::3]):
        raise ValueError(f"{pattern}: expected ranges of numbers in braces, such as {{000000..000099}}")
    ranges = list(zip(pieces[1::3], pieces[2::3], strict=True))
    for first, last in ranges:
        if int(first) > int(last):
            raise ValueError(f"{pattern}: expected a range that counts up, got {{{first}..{last}}}")
    if (count := prod(int(last) - int(first) + 1 for first, last in ranges)) > _MOST_SHARDS:
        raise ValueError(f"{pattern}: expected at most {_MOST_SHARDS:,} shards, got {count:,}")
    numbers = [[f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)] for first, last in ranges]
    texts = pieces[::3]
    return [
        Path(texts[0] + "".join(number + text for number, text in zip(chosen, texts[1:], strict=True)))
        for chosen in itertools.product(*numbers)
    ]


class TarShards(Source):
    """The images in tar shards.

    Images are read one by one from where they lie, by any number of threads and processes; a process keeps at most 64 shards
    open. The index takes 24 bytes for each image and the bytes of its name.

    Args:
        paths: of the shards, in the order of their images.
        progress: show a bar on terminals, where the first look at the shards takes a while.

    Raises:
        OSError: a shard is not there, or cannot be read; or there is no image in all of them.
        ValueError: one is no tar, or compressed; or there is none.
    """

    def __init__(self, paths: Sequence[Path], *, progress: bool = True) -> None:
        self.paths = [Path(path) for path in paths]
        if not self.paths:
            raise ValueError("paths: expected a shard, got none")
        if missing := [path for path in self.paths if not path.exists()]:
            others = f", and {len(missing) - 1} more of {len(self.paths)}" if len(missing) > 1 else ""
            raise FileNotFoundError(f"no such shard: {missing[0]}{others}")
        indices = self._indices(progress)
        self._firsts = [0, *itertools.accumulate(len(index) for index in indices)]
        if not len(self):
            raise FileNotFoundError(f"no images in {len(self.paths)} shards, the first of which is {self.paths[0]}")
        offsets, sizes, names = (_joined(index.arrays[of] for index in indices) for of in ("offsets", "sizes", "names"))
        self._offsets, self._sizes, self._names = offsets, sizes, names
        before = np.cumsum([0, *(len(index.arrays["names"]) for index in indices)])
        self._ends = _joined(index.arrays["ends"] + base for index, base in zip(indices, before[:-1], strict=True))
        numbered = any((index.arrays["numbered"] >= 0).any() for index in indices)
        self.classes, self._labels = _labels(indices, "numbered" if numbered else "folders")
        self._remarks = _remarks(self.paths, indices)
        self._opened = _Opened(self.paths)
        self._fingerprint = ""

    def __len__(self) -> int:
        return self._firsts[-1]

    def image(self, index: int) -> Image.Image:
        shard, name = self._shard(index), Name(self, index)
        size = int(self._sizes[index])
        with errors_named(name):
            try:
                data = self._opened.read(shard, size, int(self._offsets[index]), self._is_unchanged)
            except _ChangedShard as error:
                raise UnreadableImage(name, "vanished", str(error), "start again, and it is indexed anew") from None
        if len(data) < size:
            raise UnreadableImage(
                name, "truncated", f"its shard ends after {len(data):,} of its {size:,} bytes", "get the shard again"
            )
        return open_image(data, name)

    def name(self, index: int) -> str:
        return printable(os.fsencode(self.paths[self._shard(index)]) + b"/" + self._member(index))

    def fingerprint(self) -> str:
        if not self._fingerprint:
            digest = hashlib.sha256()
            for path, first in zip(self.paths, self._firsts, strict=False):
                digest.update(b"%s\0%d\0" % (os.fsencode(path.name), first))
            for array in (self._names, self._ends, self._sizes):
                digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8).data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @property
    def labels(self) -> np.ndarray:
        return self._labels

    def files(self) -> Iterable[Path]:
        return self.paths

    def remarks(self) -> list[str]:
        arrays = (self._offsets, self._sizes, self._names, self._ends, self._labels)
        held = sum(array.nbytes for array in arrays)
        return [*self._remarks, f"the index of {len(self.paths):,} shards takes {held / 2**20:,.1f} MiB of memory"]

    def _shard(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        return bisect_right(self._firsts, index) - 1

    def _member(self, index: int) -> bytes:
        return self._names[self._ends[index - 1] if index else 0 : self._ends[index]].tobytes()

    def _indices(self, progress: bool) -> list[ShardIndex]:
        bar = tqdm(total=len(self.paths), unit="shard", desc="index", delay=1, disable=None if progress else True)
        # Few threads: they wait for a disk together, and take turns at the headers.
        with bar, ThreadPoolExecutor(8) as threads:
            indices = []
            try:
                for index in threads.map(shard_index, self.paths):
                    indices.append(index)
                    bar.update()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        return indices

    def _is_unchanged(self, shard: int) -> bool:
        """Whether the shard, whose size or time of change is another now, still holds the same images in the same places."""
        first, end = self._firsts[shard], self._firsts[shard + 1]
        base = int(self._ends[first - 1]) if first else 0
        names = self._names[base : self._ends[end - 1]] if end > first else self._names[:0]
        held = {"offsets": self._offsets[first:end], "sizes": self._sizes[first:end], "names": names}
        try:
            return scanned(self.paths[shard]).same_images(ShardIndex(held, {}, {}, ""))
        except ValueError:
            return False


class _ChangedShard(Exception):
    """The shard is another than when its index was made."""


class _Descriptor:
    """An open file, closed once nobody refers to it: neither the cache nor a thread that reads."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would be waited for

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class _Opened:
    """The shards that this process has open, the most recently read ones; none in a process that it is handed to."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._known = [_state(os.stat(path)) for path in paths]
        self._start()

    def __getstate__(self) -> dict[str, object]:
        return {"_paths": self._paths, "_known": self._known}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()

    def read(self, shard: int, size: int, offset: int, is_unchanged: Callable[[int], bool]) -> bytes:
        """So many bytes of a shard, fewer where it ends before.

        Raises:
            OSError: it cannot be opened or read.
            _ChangedShard: it was written to, and `is_unchanged` denies that it holds the same images.
        """
        if self._process != os.getpid():  # of a fork, where another thread may have held the lock
            self._start()
        try:
            descriptor = self._descriptor(shard, is_unchanged)
            size = min(size, max(0, self._known[shard][0] - offset))  # a header may claim any
            data = os.pread(descriptor.number, size, offset)
            while len(data) < size and (more := os.pread(descriptor.number, size - len(data), offset + len(data))):
                data += more
            return data
        except OSError:
            with self._lock:
                self._open.pop(shard, None)  # the next one tries anew
            raise

    def _descriptor(self, shard: int, is_unchanged: Callable[[int], bool]) -> _Descriptor:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        descriptor = _Descriptor(self._paths[shard])
        now = os.fstat(descriptor.number)
        if not stat.S_ISREG(now.st_mode):
            raise _ChangedShard("the shard is no file any more")
        # One cut short meanwhile is read as far as it goes.
        if _state(now) != self._known[shard] and now.st_size >= self._known[shard][0] and not is_unchanged(shard):
            raise _ChangedShard("the shard was written to after its index was made, and holds other images")
        with self._lock:
            self._open[shard] = descriptor
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        return descriptor


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _joined(arrays: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(arrays))


def _labels(indices: list[ShardIndex], by: str) -> tuple[list[str], np.ndarray]:
    """The sorted names of all shards' classes, and int32 numbers in them; images of no class have "", which is one then."""
    names = [[*index.classes[by], ""] for index in indices]  # number -1 is the last
    used = [np.unique(index.arrays[by]).tolist() for index in indices]
    classes = sorted({own[number] for own, numbers in zip(names, used, strict=True) for number in numbers})
    place = {name: number for number, name in enumerate(classes)}
    tables = [np.array([place.get(name, 0) for name in own], dtype=np.int32) for own in names]
    return classes, _joined(table[index.arrays[by]] for table, index in zip(tables, indices, strict=True))


def _remarks(paths: Sequence[Path], indices: Sequence[ShardIndex]) -> list[str]:
    damaged = [f"{path}: {index.damage}" for path, index in zip(paths, indices, strict=True) if index.damage]
    remarks = damaged[:_MOST_REMARKS]
    if len(damaged) > _MOST_REMARKS:
        remarks.append(f"and {len(damaged) - _MOST_REMARKS:,} more shards that end too early")
    left_out = sum((Counter(index.left_out) for index in indices), Counter())
    if left_out:
        remarks.append("beside images: " + ", ".join(f"{n:,} {what}" for what, n in sorted(left_out.items())))
    return remarks


def shards_in(source: Source) -> list[TarShards]:
    """The tar shards that a source consists of, or is a part or a mixture of."""
    if isinstance(source, TarShards):
        return [source]
    inner = [*getattr(source, "sources", ()), *([source.source] if hasattr(source, "source") else ())]
    return [shards for each in inner for shards in shards_in(each)]
