"""How far the work on a source has come: a bar on terminals, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

from tqdm import tqdm

_SECONDS = 30.0
"""Seconds between two lines."""


def say(line: str) -> None:
    """A line on stdout that leaves a progress bar whole, and is there at once in a file, too."""
    with suppress(OSError):  # a terminal that is gone, or a pipe that nobody reads, is no reason to end
        tqdm.write(line)
        sys.stdout.flush()


class Progress:
    """A context in which images are counted.

    Args:
        total: images.
        what: is done with them, in a word.
        say: takes a line for the user.
        unit: of what is counted, if not images.
    """

    def __init__(self, total: int, what: str, say: Callable[[str], None], *, unit: str = "image") -> None:
        self._bar = tqdm(total=total, unit=unit, desc=what, disable=None)
        self._what, self._say, self._total, self._unit = what, say, total, unit
        self._count = self._before = 0
        self._began = self._said = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    @property
    def images_per_second(self) -> float:
        return (self._count - self._before) / (time.perf_counter() - self._began)

    def update(self, images: int = 1, *, done_before: bool = False) -> None:
        """So many more are done.

        Args:
            done_before: by another call, and so they do not count for the rate.
        """
        self._count += images
        if done_before:
            self._before += images
            self._bar.initial = self._before
        self._bar.update(images)
        if self._bar.disable and time.perf_counter() - self._said > _SECONDS and (rate := self.images_per_second):
            self._said = time.perf_counter()
            left = timedelta(seconds=round((self._total - self._count) / rate))
            self._say(
                f"{self._what}: {self._count:,}/{self._total:,} {self._unit}s, {rate:,.1f} {self._unit}s/s, {left} left"
            )
