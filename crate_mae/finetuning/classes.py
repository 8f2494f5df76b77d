"""Which classes there are, and the class of each image; by their names, since each source numbers them in its own way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crate_mae.data import Source

_NAMED = 3


def classes_of(train: Source, val: Source | None) -> tuple[str, ...]:
    """The names of the training images' classes, in their order; including those all of whose images were held out.

    Raises:
        ValueError: images have no class, or all have the same.
    """
    held = {train.classes[number] for number in np.unique(train.labels)}
    if val is not None:
        held |= {val.classes[number] for number in np.unique(val.labels)} & set(train.classes)
    if held == {""}:
        raise ValueError("its images have no classes; expected a folder for each class, or labels")
    if "" in held:
        first = int(np.argmax(train.labels == list(train.classes).index("")))
        raise ValueError(f"some of its images are of no class, such as {train.name(first)}")
    if len(held) == 1:
        raise ValueError(f"expected images of two classes or more, got those of {held.pop()!r} alone")
    return tuple(name for name in train.classes if name in held)


def labels_among(source: Source, classes: Sequence[str]) -> np.ndarray:
    """The class of each image, int64 [len(source)], as its place in `classes`.

    Raises:
        ValueError: an image is of another class.
    """
    place = {name: number for number, name in enumerate(classes)}
    numbers = np.array([place.get(name, -1) for name in source.classes], dtype=np.int64)
    labels = numbers[source.labels]
    if (labels < 0).any():
        other = sorted({source.classes[number] for number in np.unique(source.labels[labels < 0])})
        first = source.name(int(np.argmax(labels < 0)))
        raise ValueError(f"there are images of {_some(other)}, such as {first}, and the classes are {_some(classes)}")
    return labels


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{', '.join(map(repr, names[:_NAMED]))}{more}"
