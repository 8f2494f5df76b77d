"""Which images a run trains on, and which it validates on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from crate_mae.data import COLOUR_MODES, FLOWERS, ImageFolder
from crate_mae.data.listing import holds_images
from crate_mae.training.config import PretrainConfig

_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class ImageSets(NamedTuple):
    """Images to train on; to validate on, if any; and what became of the parts of `data`, in words, if it has any."""

    train: ImageFolder
    val: ImageFolder | None
    parts: str


def image_sets(config: PretrainConfig) -> ImageSets:
    """The images of a run, from its `data` and `val`.

    A folder with a data set in its usual parts, such as train/, val/ and test/, stands for the part that the option is for.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: the parts are ambiguous, or there are too few images, or the model takes no photographs.
    """
    channels = config.model.in_chans
    if channels not in COLOUR_MODES:
        raise ValueError(f"model.in_chans: image files give {sorted(COLOUR_MODES)} channels, got {channels}")

    def folder(option: str, root: Path) -> ImageFolder:
        try:
            return ImageFolder(root, channels=channels, cache_bytes=config.images.cache_mb * 2**20)
        except OSError as error:
            raise type(error)(f"{option}: {error}") from error

    data = config.data or FLOWERS
    parts = _parts_of("--data", data)
    train_root = parts.get("train", data)
    val_root = _val_root(config.val) if config.val else parts.get("val")
    uses = {train_root: "to train on", val_root: "to validate on"}
    said = ", ".join(f"{part.name}/ {uses.get(part, 'left out')}" for part in parts.values())
    said = f"of {data}, {said}" if said and config.data else ""
    train = folder("--data", train_root)
    if val_root is not None:
        return ImageSets(train, folder("--val", val_root), said)
    if not config.images.val_fraction:
        return ImageSets(train, None, said)
    try:
        return ImageSets(*train.split(config.images.val_fraction, config.run.seed), said)
    except ValueError as error:
        raise ValueError(f"--data: {error}; give --val or --images.val_fraction 0") from error


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
