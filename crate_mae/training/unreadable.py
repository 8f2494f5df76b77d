"""Counts the images that a run cannot read, and stops it if they are too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from crate_mae.data import UnreadableImage
from crate_mae.data.unreadable import TooManyUnreadable, Unreadable, by_cause, most_unreadable
from crate_mae.files import append
from crate_mae.training.ranks import Ranks

_SAID_SINGLY = 20
"""So many images have a line of their own on the screen; the others are only counted there."""


class UnreadableImages:
    """The unreadable images among those that this run has met since it was started or resumed.

    Args:
        file: lists them, a line each; an image that it lists already is not said again.
        images: how many images there are, to train and to validate on.
        most: the fraction of them that may be unreadable, rounded up to a whole image.
        say: takes a line for the user.
        ranks: with several, images count after `share`, and the first rank writes the file.
    """

    def __init__(
        self, file: Path, images: int, most: float, say: Callable[[str], None], ranks: Ranks | None = None
    ) -> None:
        self.file, self.images, self.most, self.say, self.ranks = file, images, most, say, ranks or Ranks()
        self._untold: list[Unreadable] = []
        self._met: dict[str, Unreadable] = {}
        self._listed_before: frozenset[str] | None = None
        self._listed: set[str] = set()

    def __call__(self, errors: Sequence[UnreadableImage]) -> None:
        """Note unreadable images. Those that are gone now do not count if an earlier start listed them.

        Raises:
            TooManyUnreadable: those met by now are more than are allowed.
            OSError: they cannot be written down.
        """
        self._untold += map(Unreadable.of, errors)
        if self.ranks.count == 1:
            self.share()

    def share(self) -> None:
        """Count the images of all ranks; all must call it. Errors as of `__call__`, on all ranks."""
        found = [image for of_rank in self.ranks.gathered(self._untold) for image in of_rank]
        self._untold = []
        if not found:
            return
        if self._listed_before is None:
            self._listed_before = self.ranks.of_first(lambda: frozenset(listed(self.file)))
            self._listed.update(self._listed_before)
        for image in found:
            if image.name in self._met or (image.cause == "vanished" and image.name in self._listed_before):
                continue
            self._met[image.name] = image
            if image.name not in self._listed:
                self._listed.add(image.name)
                if self.ranks.is_first:
                    append(self.file, image.line() + "\n")
                self._told(image)
            if len(self._met) > most_unreadable(self.most, self.images):
                raise TooManyUnreadable(
                    f"{len(self._met)} of {self.images} images cannot be read ({self.counted()}), more than "
                    f"--images.max_unreadable {self.most:g} allows; they are listed in {self.file}, and crate-mae check finds "
                    "all there are: mend or remove them, or allow more"
                )

    def counted(self) -> str:
        """How many there are by cause, in words; empty if there are none."""
        return by_cause(self._met.values())

    def _told(self, image: Unreadable) -> None:
        count = len(self._met)
        if count <= _SAID_SINGLY:
            self.say(f"cannot read the image {image.name} ({image.cause}: {image.reason}); another stands in for it")
        elif count & (count - 1) == 0:
            self.say(f"{count} images cannot be read by now ({self.counted()}); all are in {self.file}")


def listed(file: Path) -> set[str]:
    """The names of the images in the file of `UnreadableImages`; none if there is no file."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return set()
    return {fields[1] for line in lines if len(fields := line.split("\t")) == 3}
