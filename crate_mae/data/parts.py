"""The parts that a data set may come in: folders to train on, to validate on and to test on."""

from __future__ import annotations

import os
from pathlib import Path

from crate_mae.data.layouts import layout_in
from crate_mae.data.listing import holds_images

_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
PART_NAMES = frozenset(name for names in _PARTS.values() for name in names)
_PURPOSES = {"train": "train", "val": "validate", "test": "test"}


def parts_of(root: Path) -> dict[str, Path]:
    """The folders in `root` by the part of a data set that each is, "train" among them; none where they are classes or images.

    A data set in one of the layouts that are known (`layouts`) has its parts in files; they are named as if they were folders in
    `root`, and `open_source` knows what is meant.

    Raises:
        ValueError: they could be meant otherwise.
    """
    if not root.is_dir():
        return {}
    if known_layout := layout_in(root):
        return {part: root / part for part in known_layout.layout.parts}
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries)
    named = {
        part: [root / name for name in names if name.lower() in known and (root / name).is_dir()]
        for part, known in _PARTS.items()
    }
    found = {part: paths for part, paths in named.items() if paths}
    if "train" not in found:  # before a look into what may be a million others
        return {}
    parts = {path.name for paths in found.values() for path in paths}
    others = [
        root / name for name in names if name not in parts and not name.startswith(".") and holds_images(root / name)
    ]
    if others and len(found) == 1:  # a class may be called train, one of vehicles
        return {}
    if others or any(len(paths) > 1 for paths in found.values()):
        held = ", ".join(path.name for paths in [*found.values(), others] for path in paths)
        raise ValueError(f"{root}: it holds {held}; name the one to train on by --data, to validate on by --val")
    return {part: paths[0] for part, paths in found.items()}


def part_of(root: Path, part: str) -> Path:
    """The folder in `root` that is a part of a data set, "train", "val" or "test"; `root` itself where it has no
    parts.

    Raises:
        ValueError: it has others, and not this one; or as of `parts_of`.
    """
    parts = parts_of(root)
    if parts and part not in parts:
        held = ", ".join(path.name for path in parts.values())
        raise ValueError(f"{root}: it holds {held}; name the one to {_PURPOSES[part]} on")
    return parts.get(part, root)
