"""Which images a run trains on, and which it validates on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from crate_mae.data import (
    COLOUR_MODES,
    FLOWERS,
    ImageFolder,
    MissingLibrary,
    Source,
    absolute,
    compare,
    decoded_if_small,
    open_source,
    parts_of,
)
from crate_mae.data.specification import is_folder, members
from crate_mae.data.unreadable import most_unreadable
from crate_mae.training.config import TrainingConfig
from crate_mae.training.run_folder import UNREADABLE
from crate_mae.training.unreadable import listed as listed_in


class ImageSets(NamedTuple):
    """The images of a run.

    Attributes:
        train: images to train on.
        val: images to validate on, if there are any.
        said: lines for the user, such as which parts of `data` serve for what.
        listed: if `data` is a folder, all of its images, before some are held out; a run keeps their list.
    """

    train: Source
    val: Source | None
    said: list[str]
    listed: ImageFolder | None


def image_sets(config: TrainingConfig, kept: Path | None = None) -> ImageSets:
    """The images of a run, from its `data` and `val`.

    Of a folder that holds train/, val/ and the like, `data` means the part to train on and `val` the part to validate on.

    Args:
        config: the run's settings.
        kept: the file in which a resumed run has kept the list of its images, if it has. The run goes on with these images,
            whatever was added to the folder since, as long as no more of them are gone than `images.max_unreadable` allows;
            images that it could not read before do not count.

    Raises:
        OSError: what an option names is not there, or holds no image.
        ValueError: it is ambiguous, or there are too few images, or the model takes no photographs.
        MissingLibrary: an ImportError: one that it needs is not installed.
    """
    channels = config.model.in_chans
    if channels not in COLOUR_MODES:
        raise ValueError(f"model.in_chans: image files give {sorted(COLOUR_MODES)} channels, got {channels}")
    data = config.data if config.data is not None else str(FLOWERS)
    with of_option("--data"):
        parts = {member: parts_of(Path(member)) for member in members(data) if is_folder(member)}
    val_what = config.val or parts.get(data, {}).get("val")  # several sources have no such parts
    said = []
    for folder, of_folder in parts.items():
        uses = {of_folder.get("train"): "to train on", val_what: "to validate on"}
        words = ", ".join(f"{part.name}/ {uses.get(part, 'left out')}" for part in of_folder.values())
        said += [f"of {folder}, {words}"] if words and config.data else []

    with of_option("--data"):
        # An absolute path, as in config.json: so an image has the same name after a resume.
        train = open_source(absolute(data), part="train")
    listed = train if isinstance(train, ImageFolder) else None
    if listed and kept and kept.exists():
        train = listed = _as_it_began(listed, kept, config, said)
    said += train.remarks()
    val = None
    if val_what:
        with of_option("--val"):
            val = open_source(absolute(val_what), part="val")
        said += [f"to validate on: {remark}" for remark in val.remarks()]
        if val.name(0) == train.name(0) and val.fingerprint() == train.fingerprint():
            said.append("validated on the images that it is trained on")
    elif config.images.val_fraction:
        try:
            train, val = train.split(config.images.val_fraction, config.run.seed)
        except ValueError as error:
            raise ValueError(f"--data: {data}: {error}; give --val or --images.val_fraction 0") from error
    most = config.images.cache_mb * 2**20
    train = decoded_if_small(train, channels, most)
    return ImageSets(train, val and decoded_if_small(val, channels, most), said, listed)


@contextmanager
def of_option(name: str) -> Iterator[None]:
    """Put the option in front of the messages of errors in the block."""
    try:
        yield
    except (OSError, ValueError, MissingLibrary) as error:
        raise type(error)(f"{name}: {error}") from error


def _as_it_began(now: ImageFolder, kept: Path, config: TrainingConfig, said: list[str]) -> ImageFolder:
    """The folder with the images that the run began with, if few of these are gone; else the folder as it is now.

    Images that the run could not read do not count as gone.
    """
    try:
        began = ImageFolder(now.root, kept=kept)
    except ValueError as error:
        said.append(f"{error}; taken for the images of the run are those that there are now")
        return now
    if began.fingerprint() == now.fingerprint():
        return now
    gone, new = compare(began, now)
    removed = sum(not os.path.lexists(name) for name in listed_in(config.out / UNREADABLE))
    if gone - removed > most_unreadable(config.images.max_unreadable, len(began)):
        return now
    said.append(
        f"since the run began {gone} of its {len(began)} images are gone and {new} are new; it goes on with those it had"
    )
    return began
