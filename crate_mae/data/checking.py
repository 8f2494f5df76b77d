"""A source read from end to end: which images cannot be read, and what kinds there are."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from crate_mae.data.in_processes import each_image, stop_if
from crate_mae.data.packing import CHECKSUMS, sha256_of
from crate_mae.data.progress import Progress
from crate_mae.data.reading import shown_size, whole
from crate_mae.data.shards import shards_in
from crate_mae.data.source import Source, UnreadableImage
from crate_mae.data.unreadable import Unreadable, most_unreadable
from crate_mae.state_dicts import one_line

SMALL = 224
"""Images with a shorter side than this, in pixels, are enlarged for crops of the usual size."""

USUAL_LIMIT = 0.01
"""The fraction of unreadable images that a run tolerates by default."""

_SHOWN = 20
"""The most names in the report, over all causes."""


class Looked(NamedTuple):
    """A readable image: its size in pixels when it is upright, and its format and mode in Pillow's words."""

    width: int
    height: int
    format: str
    mode: str


@dataclass
class Report:
    """The images of a source.

    Attributes:
        images: how many there are.
        unreadable: the images that cannot be read, in their order.
        smallest, largest: (width, height), upright, of those with the fewest and the most pixels; None where none can be read.
        small: images with a short side below 224 pixels.
        kinds: numbers of images by (format, mode).
        remarks: the source's remarks.
        damaged_shards: shards that differ from the checksums beside them, with what is wrong with each.
        verified_shards: how many shards have such a checksum.
    """

    images: int
    unreadable: list[Unreadable] = field(default_factory=list)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    small: int = 0
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    damaged_shards: list[str] = field(default_factory=list)
    verified_shards: int = 0
    images_per_second: float = 0.0

    def add(self, result: Looked | Unreadable) -> None:
        if isinstance(result, Unreadable):
            self.unreadable.append(result)
            return
        size = result.width, result.height
        self.smallest = min(self.smallest or size, size, key=math.prod)
        self.largest = max(self.largest or size, size, key=math.prod)
        self.small += min(size) < SMALL
        self.kinds[result.format, result.mode] += 1

    def lines(self) -> list[str]:
        """The report, for people."""
        said = [f"{self.images:,} images, read at {self.images_per_second:,.1f} images/s"]
        if self.smallest and self.largest:
            sizes = f"sizes {_size(self.smallest)} to {_size(self.largest)}"
            said.append(f"  {sizes}, {self.small:,} with a short side below {SMALL} pixels")
        said += [f"  {count:>12,}  {format} {mode}" for (format, mode), count in self.kinds.most_common()]
        said += [f"  {remark}" for remark in self.remarks]
        if self.verified_shards:
            right = self.verified_shards - len(self.damaged_shards)
            said.append(f"  {right:,} of {self.verified_shards:,} shards are as their checksums say")
        said += [f"  {shard}" for shard in self.damaged_shards]
        if not self.unreadable:
            return [*said, "all images can be read"]
        said.append(f"{len(self.unreadable):,} cannot be read:")
        groups = defaultdict(list)
        for image in self.unreadable:
            groups[image.cause].append(image)
        shown = max(1, _SHOWN // len(groups))
        for cause, images in sorted(groups.items(), key=lambda item: -len(item[1])):
            said.append(f"  {len(images):>12,}  {cause}")
            said += [f"  {'':12}    {one_line(image.name)} ({one_line(image.reason)})" for image in images[:shown]]
            said += [f"  {'':12}    and {len(images) - shown:,} more"] * (len(images) > shown)
        allowed = most_unreadable(USUAL_LIMIT, self.images)
        goes_on = "goes on without them" if len(self.unreadable) <= allowed else "stops"
        return [*said, f"a run {goes_on}: by default it does without {USUAL_LIMIT:.0%} of the images, here {allowed:,}"]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]:,} x {size[1]:,}"


def check(
    source: Source,
    *,
    workers: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Report:
    """Read and decode every image, and the shards that have checksums beside them.

    Args:
        workers: processes that decode; with 0 this one does.
        should_stop: asked between images.
        say: takes a line for the user.

    Raises:
        Stopped: it was told to.
        LostWorkers: a process died.
    """
    report = Report(len(source), remarks=source.remarks())
    with Progress(len(source), "check", say) as progress:
        for result in each_image(looked_at, source, workers=workers, should_stop=should_stop):
            report.add(result)
            progress.update()
        report.images_per_second = progress.images_per_second
    for path, checksum in _checksums(source):
        stop_if(should_stop)
        report.verified_shards += 1
        try:
            if sha256_of(path) != checksum:
                report.damaged_shards.append(f"{path}: not as its checksum says; get it again")
        except OSError as error:
            report.damaged_shards.append(f"{path}: {error.strerror}")
    return report


def looked_at(source: Source, index: int) -> Looked | Unreadable:
    """Decode an image completely, and say what it is."""
    name = source.name(index)
    try:
        with source.image(index) as image:
            format, mode = image.format or "of no format", image.mode
            size = shown_size(image, name)
            whole(image, 3, name)
            return Looked(*size, format, mode)
    except UnreadableImage as error:
        return Unreadable.of(error)


def _checksums(source: Source) -> list[tuple[Path, str]]:
    """The source's shards that `checksums.sha256` beside them lists, with their SHA-256."""
    found = []
    paths = [path for shards in shards_in(source) for path in shards.paths]
    for folder, inside in itertools.groupby(paths, key=lambda path: path.parent):
        try:
            rows = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            continue
        listed = {
            name[1:]: checksum for checksum, _, name in (row.partition(" ") for row in rows)
        }  # " name" or "*name"
        found += [(path, listed[path.name].lower()) for path in inside if path.name in listed]
    return found
