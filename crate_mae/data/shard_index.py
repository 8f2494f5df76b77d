"""The places of the images in a tar shard, from the headers of its members; kept in an index file for the next time."""

from __future__ import annotations

import json
import os
import re
import stat
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from crate_mae.data.index_files import cache_file, read_index, write_index
from crate_mae.data.paths import printable
from crate_mae.data.reading import IMAGE_SUFFIXES

INDEX_SUFFIX = ".index"
"""The suffix of the index beside a shard: images-000000.tar.index."""

_LAYOUT = "1"
"""The version of an index; indices of other versions are made again."""

_LARGEST = 2**32 - 1
"""The most bytes of a member that is taken for an image."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

_BLOCK = 512


@dataclass
class ShardIndex:
    """The places of the images in one shard.

    Attributes:
        arrays: `offsets` int64 and `sizes` uint32 of their data, in bytes; `names`, uint8, one after the other, and int64 `ends`
            in there; `numbered` and `folders`, int32, the class that .cls members and folders give each, -1 where none does.
        classes: names that `numbered` and `folders` number.
        left_out: members that are no images, by what they are.
        damage: how the shard ends too early; "" if it does not.
    """

    arrays: dict[str, np.ndarray]
    classes: dict[str, list[str]]
    left_out: dict[str, int]
    damage: str

    def __len__(self) -> int:
        return len(self.arrays["offsets"])

    def same_images(self, other: ShardIndex) -> bool:
        return all(np.array_equal(self.arrays[name], other.arrays[name]) for name in ("offsets", "sizes", "names"))


def shard_index(path: Path, *, beside: bool = False) -> ShardIndex:
    """The index of a shard, kept for as long as the shard's size and time of change stay what they are.

    Args:
        beside: keep a new one beside the shard, rather than in the user's cache.

    Raises:
        OSError: the shard cannot be read; it names the path.
        ValueError: it is no tar, or compressed.
    """
    try:
        now = os.stat(path)
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror}") from error
    known = {"layout": _LAYOUT, "size": str(now.st_size), "mtime_ns": str(now.st_mtime_ns)}
    known["suffixes"] = " ".join(sorted(IMAGE_SUFFIXES))
    own = path.with_name(path.name + INDEX_SUFFIX)
    for place in (own,) if beside else (own, cache_file("shard", os.path.abspath(path))):
        if found := read_index(place):
            arrays, about = found
            if known.items() <= about.items():
                return ShardIndex(arrays, **json.loads(about["rest"]))
    index = scanned(path)
    rest = json.dumps({"classes": index.classes, "left_out": index.left_out, "damage": index.damage})
    write_index(own if beside else cache_file("shard", os.path.abspath(path)), index.arrays, {**known, "rest": rest})
    return index


def scanned(path: Path) -> ShardIndex:
    """The index of a shard, from the headers of its members.

    Raises: as `shard_index`.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}: expected a tar file")
        # A buffer as large as two blocks: tarfile looks at the byte before a header, then at the header, and skips the data.
        with open(path, "rb", buffering=2 * _BLOCK) as file:
            start = file.read(8)
            if kind := next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None):
                raise ValueError(
                    f"{path}: compressed by {kind}, in which no image can be sought; decompress it, such as by gunzip"
                )
            file.seek(0)
            return _Scan(path, file.fileno(), os.fstat(file.fileno()).st_size).of(file)
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror or error}") from error


class _Scan:
    """The scan of one shard, and what it has gathered."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.descriptor, self.size = path, descriptor, size
        self.names: list[bytes] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.left_out: Counter[str] = Counter()
        self.numbers: dict[bytes, str] = {}  # by key, of .cls members
        self.links: list[tuple[bytes, bytes]] = []

    def of(self, file: BinaryIO) -> ShardIndex:
        end = self._members(file)
        self._follow_links()
        whole = sum(offset + size <= self.size for offset, size in zip(self.offsets, self.sizes, strict=True))
        damage = end and f"{end}: {whole:,} whole images, {len(self.names) - whole:,} cut"
        keys = [self.numbers.get(_key(name)) for name in self.names]
        folders = [printable(parts[0]) if len(parts := _parts(name)) > 1 else None for name in self.names]
        numbered, number_names = _numbered(keys)
        sorted_into, folder_names = _numbered(folders)
        arrays: dict[str, np.ndarray] = {
            "offsets": np.array(self.offsets, dtype=np.int64),
            "sizes": np.array(self.sizes, dtype=np.uint32),
            "names": np.frombuffer(b"".join(self.names), dtype=np.uint8),
            "ends": np.cumsum([len(name) for name in self.names], dtype=np.int64),
            "numbered": numbered,
            "folders": sorted_into,
        }
        return ShardIndex(arrays, {"numbered": number_names, "folders": folder_names}, dict(self.left_out), damage)

    def _members(self, file: BinaryIO) -> str:
        """Take all members; returns how the shard ends before its end mark, if it does."""
        last = -1
        try:
            tar = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")
            while member := tar.next():
                if not (last < member.offset and member.size >= 0):
                    raise tarfile.ReadError(f"a header that leads back, to byte {tar.offset}")
                last = member.offset
                self._take(member)
                # TarFile keeps each member, a kilobyte of memory. The attribute is documented; typeshed does not have it.
                tar.members.clear()  # type: ignore[attr-defined]
                if tar.offset > self.size:  # by how much, a damaged header says
                    break
            after = os.pread(self.descriptor, _BLOCK, min(tar.offset, self.size))
        except OSError:
            raise
        except Exception as error:  # beside TarError, whatever fields that are none lead tarfile to
            if last < 0:
                raise ValueError(f"{self.path}: not a tar file ({error}); get it again, or leave it out") from error
            if tar.offset > self.size:
                return f"cut short, after {self.size:,} bytes"
            return f"damaged after byte {last:,}, and what follows is not seen ({error})"
        if len(after) < _BLOCK:  # here and below, where tarfile ends without a word
            return f"cut short, after {self.size:,} bytes"
        return f"damaged at byte {tar.offset:,}, and what follows is not seen" if after.strip(b"\0") else ""

    def _take(self, member: tarfile.TarInfo) -> None:
        name = member.name.encode("utf-8", "surrogateescape")
        parts = _parts(name)
        suffix = os.path.splitext(printable(parts[-1]))[1].lower() if parts else ""
        if member.isdir():
            return
        if any(part.startswith(b".") for part in parts) or not parts:
            self.left_out["hidden"] += 1
        elif suffix not in IMAGE_SUFFIXES:
            self.left_out[suffix or "without a suffix"] += 1
            if suffix == ".cls" and member.isreg():
                self._take_class(name, member)
        elif member.islnk():
            self.links.append((name, member.linkname.encode("utf-8", "surrogateescape")))
        elif member.issym():
            self.left_out["symbolic links"] += 1
        elif not member.isreg() or member.issparse():
            self.left_out["no plain files"] += 1
        elif member.size > _LARGEST:
            self.left_out["larger than 4 GiB"] += 1
        else:
            self._add(name, member.offset_data, member.size)

    def _add(self, name: bytes, offset: int, size: int) -> None:
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def _take_class(self, name: bytes, member: tarfile.TarInfo) -> None:
        text = os.pread(self.descriptor, min(member.size, 32), member.offset_data).strip()
        if re.fullmatch(rb"[+-]?\d+", text):
            self.numbers[_key(name)] = str(int(text))
        else:
            self.left_out[".cls that are no whole number"] += 1

    def _follow_links(self) -> None:
        """Hard links are other names for data that the shard has once, in a member before them."""
        if self.links:
            places = {name: place for place, name in enumerate(self.names)}
            for name, target in self.links:
                if (place := places.get(target)) is None:
                    self.left_out["hard links to no image of the shard"] += 1
                else:
                    self._add(name, self.offsets[place], self.sizes[place])


def _parts(name: bytes) -> list[bytes]:
    return [part for part in name.split(b"/") if part not in (b"", b".")]


def _key(name: bytes) -> bytes:
    """The key that the members of a WebDataset sample share: the name up to the first dot after its folders."""
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def _numbered(names: list[str | None]) -> tuple[np.ndarray, list[str]]:
    """int32 numbers in the sorted names, -1 for None; and these names."""
    known = sorted({name for name in names if name is not None})
    place = {name: number for number, name in enumerate(known)}
    return np.array([-1 if name is None else place[name] for name in names], dtype=np.int32), known
