"""Published data sets as they are distributed, known by what lies in a folder: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from crate_mae.data.layouts.cifar import CIFARS
from crate_mae.data.layouts.flowers102 import FLOWERS102
from crate_mae.data.layouts.layout import Layout
from crate_mae.data.layouts.pets import PETS
from crate_mae.data.listing import holds_images
from crate_mae.data.source import Source

LAYOUTS = (*CIFARS, FLOWERS102, PETS)


class Found(NamedTuple):
    """A data set in a layout.

    Attributes:
        layout: of it.
        root: the folder that holds its files.
    """

    layout: Layout
    root: Path


def layout_in(folder: Path) -> Found | None:
    """The data set that a folder holds in one of the layouts, in itself or in a folder of the name that the set comes with.

    Raises:
        ValueError: it holds several, or images beside one.
    """
    below = [Found(layout, folder / layout.folder) for layout in LAYOUTS]
    found = [
        each for each in (*(Found(layout, folder) for layout in LAYOUTS), *below) if each.layout.lies_in(each.root)
    ]
    if not found:
        return None
    held = [f"{each.root} ({each.layout.title})" for each in found]
    parts = {part for each in found for part in each.layout.parts}
    held += [str(folder / part) for part in sorted(parts) if (folder / part).is_dir()]
    if len(held) == 1 and found[0].root != folder:
        names = sorted(path.name for path in folder.iterdir())
        others = [folder / name for name in names if not name.startswith(".") and name != found[0].root.name]
        held += [str(path) for path in others if holds_images(path)]
    if len(held) > 1:
        raise ValueError(f"{folder}: it holds several data sets: {', '.join(held)}; name one of them")
    return found[0]


def open_layout(path: Path) -> Source | None:
    """The images of a data set in one of the layouts; None where there is none.

    Args:
        path: the folder, for the images of all parts; or a part, as if it were a folder in it: `cifar-10-batches-py/test`.

    Raises:
        ValueError, OSError: as of `layout_in`, and of `Layout.read`.
    """
    if path.is_dir():
        found = layout_in(path)
        return found and found.layout.read(found.root, list(found.layout.parts))
    of_some = any(path.name in layout.parts for layout in LAYOUTS)  # before a look into a folder that is another matter
    if of_some and path.parent.is_dir() and (found := layout_in(path.parent)) and path.name in found.layout.parts:
        return found.layout.read(found.root, [path.name])
    return None


__all__ = ["LAYOUTS", "Found", "Layout", "layout_in", "open_layout"]
