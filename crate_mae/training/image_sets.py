"""Which images a run trains on, and which it validates on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from crate_mae.data import (
    COLOUR_MODES,
    FLOWERS,
    ImageFolder,
    Source,
    absolute,
    compare,
    decoded_if_small,
    holds_images,
    open_source,
)
from crate_mae.data.specification import is_folder
from crate_mae.training.config import PretrainConfig

_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class ImageSets(NamedTuple):
    """The images of a run.

    Attributes:
        train: to train on.
        val: to validate on, if any are.
        said: what a user should know of them, in words: what became of the parts of `data`, what was left out.
        listed: what `data` names, where that is a folder, whose list a run keeps: of all images, before any were held out.
    """

    train: Source
    val: Source | None
    said: list[str]
    listed: ImageFolder | None


def image_sets(config: PretrainConfig, kept: Path | None = None) -> ImageSets:
    """The images of a run, from its `data` and `val`.

    A folder with a data set in its usual parts, such as train/, val/ and test/, stands for the part that the option is for.

    Args:
        kept: the list that a run has kept of its images. It goes on with them if some of them are gone meanwhile, not more than
            may be unreadable, and whatever was added.

    Raises:
        OSError: what an option names is not there, or holds no image.
        ValueError: it is ambiguous, or there are too few images, or the model takes no photographs.
        ImportError: a library that it needs is missing.
    """
    channels = config.model.in_chans
    if channels not in COLOUR_MODES:
        raise ValueError(f"model.in_chans: image files give {sorted(COLOUR_MODES)} channels, got {channels}")
    data = config.data if config.data is not None else str(FLOWERS)
    parts = _parts_of("--data", Path(data)) if is_folder(data) else {}
    train_root = parts.get("train", data)
    val_root = config.val and (_val_root(Path(config.val)) if is_folder(config.val) else config.val)
    val_root = val_root or parts.get("val")
    uses = {str(train_root): "to train on", str(val_root): "to validate on"}
    said = ", ".join(f"{part.name}/ {uses.get(str(part), 'left out')}" for part in parts.values())
    said = [f"of {data}, {said}"] if said and config.data else []

    train: Source = _opened("--data", train_root)
    listed = train if isinstance(train, ImageFolder) else None
    if listed and kept and kept.exists():
        train = listed = _as_it_began(listed, kept, config.images.max_unreadable, said)
    said += train.remarks()
    val = None
    if val_root is not None:
        val = _opened("--val", val_root)
        said += [f"to validate on: {remark}" for remark in val.remarks()]
    elif config.images.val_fraction:
        try:
            train, val = train.split(config.images.val_fraction, config.run.seed)
        except ValueError as error:
            raise ValueError(f"--data: {data}: {error}; give --val or --images.val_fraction 0") from error
    most = config.images.cache_mb * 2**20
    train = decoded_if_small(train, channels, most)
    return ImageSets(train, val and decoded_if_small(val, channels, most), said, listed)


def _opened(option: str, what: str | Path) -> Source:
    try:  # in the form of config.json: an image has the same name before and after a resume
        return open_source(absolute(what))
    except (OSError, ValueError) as error:
        raise type(error)(f"{option}: {error}") from error


def _as_it_began(now: ImageFolder, kept: Path, most: float, said: list[str]) -> ImageFolder:
    """The folder with the images that a run has had from its beginning, if that is a matter of few; else as it is now."""
    try:
        began = ImageFolder(now.root, kept=kept)
    except ValueError as error:
        said.append(f"{error}; taken for the images of the run are those that there are now")
        return now
    if began.fingerprint() == now.fingerprint():
        return now
    gone, new = compare(began, now)
    if gone > math.ceil(most * len(began)):
        return now
    said.append(
        f"since the run began {gone} of its {len(began)} images are gone and {new} are new; it goes on with those it had"
    )
    return began


def _val_root(root: Path) -> Path:
    parts = _parts_of("--val", root)
    if parts and "val" not in parts:
        raise ValueError(f"--val {root}: it holds {_names(parts.values())}; name the one to validate on")
    return parts.get("val", root)


def _parts_of(option: str, root: Path) -> dict[str, Path]:
    """The folders in `root` by the part of a data set that each is, "train" among them; none where they are classes or images."""
    if not root.is_dir():
        return {}
    found: dict[str, list[Path]] = {part: [] for part in _PARTS}
    others = []
    for path in sorted(root.iterdir()):
        part = next((part for part, names in _PARTS.items() if path.name.lower() in names and path.is_dir()), None)
        if part:
            found[part].append(path)
        elif not path.name.startswith(".") and holds_images(path):
            others.append(path)
    found = {part: paths for part, paths in found.items() if paths}
    if "train" not in found or (others and len(found) == 1):  # a class may be called train, one of vehicles
        return {}
    if others or any(len(paths) > 1 for paths in found.values()):
        held = _names(path for paths in [*found.values(), others] for path in paths)
        raise ValueError(
            f"{option} {root}: it holds {held}; name the one to train on by --data, to validate on by --val"
        )
    return {part: paths[0] for part, paths in found.items()}


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
