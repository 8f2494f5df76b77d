"""Images that cannot be read, as they are counted and listed: a line each, `cause<TAB>name<TAB>reason`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from crate_mae.data.source import UnreadableImage
from crate_mae.files import replaced
from crate_mae.state_dicts import one_line


class Unreadable(NamedTuple):
    """An `UnreadableImage` as it is recorded."""

    cause: str
    name: str
    reason: str

    @classmethod
    def of(cls, error: UnreadableImage) -> Unreadable:
        return cls(error.cause, error.name, error.reason)

    def line(self) -> str:
        return "\t".join(map(one_line, self))


class TooManyUnreadable(RuntimeError):
    """More images cannot be read than may be; where they are checked, none may."""


def write_list(path: Path, images: Iterable[Unreadable]) -> None:
    """Write a line for each, in their order.

    Raises:
        OSError: it cannot be written.
    """
    with replaced(path) as file:
        file.write("".join(image.line() + "\n" for image in images).encode())


def most_unreadable(fraction: float, images: int) -> int:
    """How many of the images may be unreadable: the fraction of them, as it is written, rounded up to a whole image."""
    return math.ceil(Fraction(repr(fraction)) * images)


def by_cause(images: Iterable[Unreadable]) -> str:
    """How many for each cause, such as "12 truncated, 1 empty"."""
    counts = Counter(image.cause for image in images)
    return ", ".join(f"{count:,} {cause}" for cause, count in counts.most_common())
