"""Any source of images as tar shards of small ones, which is what training reads fastest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import PIL

from crate_mae.data.in_processes import each_image, stop_if
from crate_mae.data.packed_image import PackedImage, packed_image
from crate_mae.data.progress import Progress
from crate_mae.data.reading import IMAGE_SUFFIXES
from crate_mae.data.shard_index import INDEX_SUFFIX, shard_index
from crate_mae.data.shards import shards_in
from crate_mae.data.source import Source
from crate_mae.data.unreadable import TooManyUnreadable, Unreadable, by_cause, most_unreadable, write_list
from crate_mae.files import make_folder, remove, remove_unfinished, replaced, write_json

JOURNAL, CHECKSUMS, UNREADABLE = "pack.json", "checksums.sha256", "unreadable.txt"

_LONGEST_STEM = 80
"""Bytes of the original name that are kept."""

_END = bytes(2 * tarfile.BLOCKSIZE)
"""The end mark of a tar."""

_PIECE = 2**20


@dataclass(frozen=True)
class PackSettings:
    """The settings on which the bytes of the shards depend.

    Attributes:
        short_side: the longest short side in pixels; images with a longer one are resized.
        shard_size: the most bytes of a shard with more than one image.
        quality: of JPEG, 1 to 100.
        name: the shards' name, before their numbers.

    Raises:
        ValueError: one of them is out of range.
    """

    short_side: int = 256
    shard_size: int = 10**9
    quality: int = 92
    name: str = "images"

    def __post_init__(self) -> None:
        if self.short_side < 1:
            raise ValueError(f"short_side: expected a number of pixels, 1 or more, got {self.short_side}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size: expected a number of bytes, 1 or more, got {self.shard_size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, got {self.quality}")
        if not re.fullmatch(r"\w[\w.-]*", self.name, re.ASCII):
            raise ValueError(f"name: expected letters, digits, _, - and ., got {self.name!r}")


@dataclass(frozen=True)
class Shard:
    """A finished shard, of the images `first` to `last` of the source, without those that cannot be read."""

    file: str
    first: int
    last: int
    images: int
    size: int
    sha256: str
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class Packed:
    """The finished shards of a source."""

    shards: list[Shard]
    unreadable: list[Unreadable]
    images_per_second: float
    """The speed of this call."""

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def pack(
    source: Source,
    out: Path,
    settings: PackSettings | None = None,
    *,
    workers: int = 0,
    max_unreadable: float = 0.01,
    overwrite: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Packed:
    """Write the images of a source to shards in a folder. The same call continues one that was interrupted.

    An image becomes a member `class/000000012_name.jpg`, by its number in the source. Its file is stored as it is where it is
    small, upright, of 8 bits and of one frame; else a JPEG with a short side of at most `short_side`, upright, or a PNG where
    pixels are transparent, or small and in no file of their own. The bytes of a shard are a function of the images, the settings
    and the versions of the libraries that encode. Beside it lies its index, and beside all of them their checksums and the list
    of what cannot be read.

    Args:
        settings: by default, `PackSettings()`.
        workers: processes that decode and encode; with 0 this one does.
        max_unreadable: the fraction of the images, rounded up to a whole number of them, that may be left out.
        overwrite: delete the shards that are there, and start anew.
        should_stop: asked between images.
        say: takes a line for the user.

    Raises:
        ValueError: the folder holds other shards, or the source's own.
        TooManyUnreadable: more cannot be read. What is finished is kept.
        Stopped: it was told to. What is finished is kept.
        LostWorkers: a process died.
        OSError: a file cannot be written.
    """
    return _Packing(source, out, settings or PackSettings(), workers, max_unreadable, should_stop).run(overwrite, say)


class _Packing:
    def __init__(
        self,
        source: Source,
        out: Path,
        settings: PackSettings,
        workers: int,
        max_unreadable: float,
        should_stop: Callable[[], bool],
    ) -> None:
        if not 0 <= max_unreadable <= 1:
            raise ValueError(f"max_unreadable: expected a fraction, 0 to 1, got {max_unreadable}")
        if any(path.parent.resolve() == out.resolve() for shards in shards_in(source) for path in shards.paths):
            raise ValueError(f"{out}: the shards to read are there; expected another folder to write to")
        self.source, self.out, self.settings, self.workers = source, out, settings, workers
        self.max_unreadable, self.should_stop = max_unreadable, should_stop
        self.folders, self.labels = _class_folders(source.classes), source.labels
        self.shards: list[Shard] = []
        self.unreadable: list[Unreadable] = []
        self.about = {
            "settings": {**asdict(settings), "pillow": PIL.__version__},
            "source": {"images": len(source), "fingerprint": source.fingerprint()},
        }

    def run(self, overwrite: bool, say: Callable[[str], None]) -> Packed:
        make_folder(self.out)
        remove_unfinished(self.out)
        if overwrite:
            self._remove()
        recorded = self._recorded()
        self._write_journal(recorded)
        stream = _Stream(self, 0)
        with Progress(len(self.source), "pack", say) as progress:
            try:
                while (first := self.shards[-1].last + 1 if self.shards else 0) < len(self.source):
                    known = recorded[len(self.shards)] if len(self.shards) < len(recorded) else None
                    if known and known.first == first and self._is_whole(known):
                        shard = known
                        self.unreadable += shard.unreadable
                        progress.update(shard.last + 1 - first, done_before=True)
                    else:
                        if stream.next != first:
                            stream.close()
                            stream = _Stream(self, first)
                        shard = self._write(stream, progress)
                    shard_index(self.out / shard.file, beside=True)
                    self.shards.append(shard)
                    self._write_journal(recorded)
            finally:
                stream.close()
        with replaced(self.out / CHECKSUMS) as file:
            file.write("".join(f"{shard.sha256}  {shard.file}\n" for shard in self.shards).encode())
        self._write_unreadable()
        return Packed(self.shards, self.unreadable, progress.images_per_second)

    def _write(self, stream: _Stream, progress: Progress) -> Shard:
        """Write the next shard, from the stream's position on."""
        path = self.out / f"{self.settings.name}-{len(self.shards):06}.tar"
        first, images, size, digest = stream.next, 0, 0, hashlib.sha256()
        before = len(self.unreadable)
        with replaced(path) as file:
            while (result := stream.peek()) is not None:
                if isinstance(result, Unreadable):
                    self._leave_out(result)
                else:
                    member = self._member(stream.next, result)
                    if images and size + len(member) + len(_END) > self.settings.shard_size:
                        break
                    file.write(member)
                    digest.update(member)
                    images, size = images + 1, size + len(member)
                stream.take()
                progress.update()
            file.write(_END)
            digest.update(_END)
        unreadable = self.unreadable[before:]
        return Shard(path.name, first, stream.next - 1, images, size + len(_END), digest.hexdigest(), unreadable)

    def _member(self, index: int, image: PackedImage) -> bytes:
        """Header and data of a member, as a tar has them."""
        folder = self.folders[self.labels[index]]
        stem = _stem(self.source.name(index))
        header = tarfile.TarInfo(f"{folder}{index:09}_{stem}{image.suffix}")
        header.size = len(image.data)  # no other field depends on the image, the time or the machine
        padding = bytes(-len(image.data) % tarfile.BLOCKSIZE)
        return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + image.data + padding

    def _leave_out(self, image: Unreadable) -> None:
        self.unreadable.append(image)
        if len(self.unreadable) > (allowed := most_unreadable(self.max_unreadable, len(self.source))):
            self._write_unreadable()
            raise TooManyUnreadable(
                f"more than {allowed:,} of {len(self.source):,} images cannot be read ({by_cause(self.unreadable)}), which "
                f"is the most that --max_unreadable {self.max_unreadable:g} allows; {self.out / UNREADABLE} lists them"
            )

    def _is_whole(self, shard: Shard) -> bool:
        """Whether the shard is there, byte for byte."""
        stop_if(self.should_stop)
        path = self.out / shard.file
        return path.is_file() and path.stat().st_size == shard.size and sha256_of(path) == shard.sha256

    def _recorded(self) -> list[Shard]:
        """The shards that a call before this one finished.

        Raises:
            ValueError: they are of something else.
        """
        journal = self.out / JOURNAL
        remedy = "name another folder, or delete what is there with --overwrite"
        if not journal.exists():
            if found := sorted(self.out.glob("*.tar")):
                raise ValueError(f"{self.out} holds {found[0].name}, of which no {JOURNAL} tells; {remedy}")
            return []
        try:
            about = json.loads(journal.read_text(encoding="utf-8"))
            shards = [
                Shard(**{**each, "unreadable": [Unreadable(*row) for row in each["unreadable"]]})
                for each in about.pop("shards")
            ]
            differences = [
                "other images" if name == "fingerprint" else f"{name} {about[section][name]} there, {value} now"
                for section in self.about
                for name, value in self.about[section].items()
                if about[section][name] != value
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{journal}: damaged ({type(error).__name__}: {error}); {remedy}") from None
        if differences:
            raise ValueError(f"{self.out} holds other shards ({'; '.join(differences)}); {remedy}")
        return shards

    def _remove(self) -> None:
        """Delete what `pack` writes, whatever it was made of.

        Raises:
            ValueError: there are other shards beside it, of which it would seem to be a part.
        """
        names = [self.settings.name]
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            names.append(json.loads((self.out / JOURNAL).read_text(encoding="utf-8"))["settings"]["name"])
        shard = re.compile(f"({'|'.join(map(re.escape, names))})-" + r"\d{6}\.tar")
        if others := sorted(path.name for path in self.out.glob("*.tar") if not shard.fullmatch(path.name)):
            raise ValueError(f"{self.out} holds {others[0]}, which is none of its shards; name another folder")
        for path in [*self.out.iterdir()]:
            name = path.name.removesuffix(INDEX_SUFFIX)
            if name in (JOURNAL, CHECKSUMS, UNREADABLE) or shard.fullmatch(name):
                remove(path)

    def _write_journal(self, recorded: list[Shard]) -> None:
        """Record the finished shards: those of this call, then those of an earlier call that this one has not reached."""
        shards = [*self.shards, *recorded[len(self.shards) :]]
        write_json(self.out / JOURNAL, {**self.about, "shards": [_as_dict(shard) for shard in shards]})

    def _write_unreadable(self) -> None:
        if self.unreadable:
            write_list(self.out / UNREADABLE, self.unreadable)
        else:
            remove(self.out / UNREADABLE)


class _Stream:
    """The packed images from one on, in their order; nothing starts before the first is asked for."""

    def __init__(self, packing: _Packing, first: int) -> None:
        self.next = first
        settings = packing.settings
        work = partial(packed_image, short_side=settings.short_side, quality=settings.quality)
        self._results = each_image(
            work, packing.source, first=first, workers=packing.workers, should_stop=packing.should_stop
        )
        self._result: PackedImage | Unreadable | None = None

    def peek(self) -> PackedImage | Unreadable | None:
        """The result for image number `next`; None at the end."""
        if self._result is None:
            self._result = next(self._results, None)
        return self._result

    def take(self) -> None:
        self.next, self._result = self.next + 1, None

    def close(self) -> None:
        self._results.close()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _as_dict(shard: Shard) -> dict[str, Any]:
    return {each.name: getattr(shard, each.name) for each in fields(shard)}


def _class_folders(classes: Sequence[str]) -> list[str]:
    """For each class the folder of its members, with a slash; none for the class "".

    Raises:
        ValueError: two of them would have one.
    """
    folders = [re.sub(r"[/\x00-\x1f\x7f]|^\.", lambda found: f"%{ord(found[0]):02X}", name) for name in classes]
    if len(set(folders)) < len(folders):
        raise ValueError(f"classes: expected names that can be told apart as folders, got {classes}")
    return [folder and folder + "/" for folder in folders]


def _stem(name: str) -> str:
    """The letters and digits of an image's name, without folders and suffix: valid as a file name on every system, and without
    a dot, at which WebDataset cuts names."""
    stem, suffix = os.path.splitext(name.rpartition("/")[2])
    stem = re.sub(r"[^\w-]+", "_", stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix)
    return stem.strip("_").encode()[:_LONGEST_STEM].decode("utf-8", "ignore")
