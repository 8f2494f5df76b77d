"""A labelled data set in two parts: one to train a classifier on, and one to test it on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from crate_mae.data.huggingface import HuggingFaceImages
from crate_mae.data.layouts import layout_in
from crate_mae.data.parts import parts_of
from crate_mae.data.source import Source, WrappedSource
from crate_mae.data.specification import is_folder, members, open_source

_SPLITS = ("test", "validation", "val", "valid", "dev")
"""Splits of a Hugging Face dataset to test on; the first that exists is taken."""


class LabelledParts(NamedTuple):
    """The two parts. Their classes are the same, and a class has the same number in both.

    Attributes:
        train: to train on.
        test: to test on.
        said: remarks for the user: which parts of the data set are used for what, and what was left out.
        named: names of the two parts for `open_source`.
    """

    train: Source
    test: Source
    said: list[str]
    named: tuple[str, str]


class Relabelled(WrappedSource):
    """The images of another source, with other numbers for their classes.

    Args:
        source: of the images.
        labels: int32 [len(source)].
        classes: names, by label.
    """

    def __init__(self, source: Source, labels: np.ndarray, classes: list[str]) -> None:
        super().__init__(source)
        self.classes, self._labels = classes, labels

    @property
    def labels(self) -> np.ndarray:
        return self._labels


def labelled_parts(what: str | Path, *, test: str | Path | None = None) -> LabelledParts:
    """The labelled images that `--data` names, to train a classifier on and to test it on.

    In a data set with several parts the classifier is trained on "train" and tested on "test", or on "val" where there is no
    "test". A published data set in a known layout is trained on all parts that it is not tested on: Flowers-102 on the 2,040
    images of "train" and "val", as in the literature's transfer protocol. Classes are matched by their names; classes without a
    training image are left out.

    Args:
        what: as for `open_source`, but one data set, not several with weights. hf:NAME is tested on its split "test", or on one
            for validation, unless a split is named.
        test: the data set to test on, named likewise; a folder with parts stands for its "test", or "val". Then `what` is trained
            on its part "train", or on all of it where it has no parts.

    Raises:
        OSError: it is not there, or holds no image.
        ValueError: there is no part to test on; there are fewer than two classes, images without a class, or images to test on
            of a class without training images; or both parts are the same images.
        MissingLibrary: an ImportError: one that it needs is not installed.
    """
    what, test = str(what), None if test is None else str(test)
    for each in (what, test):
        if each and members(each) != [each]:
            raise ValueError(f"{each}: expected one data set to train a classifier on, got several with weights")
    said: list[str] = []
    if test is not None:
        named = (
            _named(what, ["train"], "to train on", said),
            _named(test, ["test", "val"], "to test on", said),
        )
        train, tested = map(open_source, named)
    elif what.startswith("hf:") and not Path(what).exists():
        train, split = _with_test_split(what, said)
        named = what, f"{what},split={split}"
        tested = open_source(named[1])
    else:
        parts = parts_of(Path(what)) if is_folder(what) else {}
        held_out = next((part for part in ("test", "val") if part in parts), None)
        if held_out is None:
            if is_folder(what) and not Path(what).exists():
                open_source(what)  # which tells that, and what might be meant
            raise ValueError(
                f"{what}: it has no part to test on; put a test/ or val/ beside its train/, or name what to test on (test)"
            )
        published = layout_in(Path(what))
        trained = [part for part in parts if part != held_out] if published else ["train"]
        uses = dict.fromkeys(trained, "to train on") | {held_out: "to test on"}
        said.append(f"of {what}, " + ", ".join(f"{parts[part].name}/ {uses.get(part, 'left out')}" for part in parts))
        train = published.layout.read(published.root, trained) if published else open_source(parts["train"])
        tested = open_source(parts[held_out])
        counts = {part: published.layout.parts[part] for part in trained} if published else {}
        several = " + ".join(f"{counts[part]} {parts[part]}" for part in trained) if len(trained) > 1 else ""
        named = several or str(parts[trained[0]]), str(parts[held_out])
    said += [f"to train on: {remark}" for remark in train.remarks()]
    said += [f"to test on: {remark}" for remark in tested.remarks()]
    if len(train) == len(tested) and train.name(0) == tested.name(0) and train.fingerprint() == tested.fingerprint():
        raise ValueError(f"{test or what}: the images to test on are those that are trained on")
    return LabelledParts(*_numbered_alike(train, tested, what, test or what), said, named)


def _named(what: str, wanted: list[str], use: str, said: list[str]) -> str:
    """The name of the first wanted part that a data set has, or its own name where it has no parts."""
    parts = parts_of(Path(what)) if is_folder(what) else {}
    part = next((part for part in wanted if part in parts), None)
    if parts and part is None:
        held = ", ".join(path.name for path in parts.values())
        raise ValueError(f"{what}: it holds {held}; name the one {use}")
    if part:
        words = (f"{path.name}/ {use if name == part else 'left out'}" for name, path in parts.items())
        said.append(f"of {what}, {', '.join(words)}")
    return str(parts[part]) if part else what


def _with_test_split(what: str, said: list[str]) -> tuple[Source, str]:
    """A Hugging Face dataset to train on, and the name of its split to test on."""
    train = open_source(what)
    assert isinstance(train, HuggingFaceImages)
    split = next((each for each in _SPLITS if each in train.other_splits), None)
    if ",split=" in what or split is None:
        held = ", ".join(train.other_splits) or "no other split"
        raise ValueError(f"{what}: name a split to test on (test), such as hf:NAME,split=test; it has {held}")
    said.append(f"of {what}, split train to train on, {split} to test on")
    return train, split


def _numbered_alike(train: Source, test: Source, train_what: str, test_what: str) -> tuple[Source, Source]:
    """Both sources, with the classes of the training images, numbered alike."""
    for source, what in ((train, train_what), (test, test_what)):
        held = _held(source)
        if held == [""]:
            raise ValueError(f"{what}: its images have no classes; expected a folder for each class, or labels")
        if "" in held:
            count = int((source.labels == list(source.classes).index("")).sum())
            raise ValueError(f"{what}: {count:,} of its images are of no class, such as {_example(source, '')}")
    classes = _held(train)
    if len(classes) == 1:
        raise ValueError(f"{train_what}: expected two classes or more to train on, got {classes[0]!r} alone")
    if unknown := [name for name in _held(test) if name not in set(classes)]:
        more = f" and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"{test_what}: to test on are images of {', '.join(unknown[:3])}{more}, of which none is trained on, such as "
            f"{_example(test, unknown[0])}; trained on are {', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}"
        )
    return _with_classes(train, classes), _with_classes(test, classes)


def _held(source: Source) -> list[str]:
    """Names of the classes that have an image."""
    return [source.classes[number] for number in np.unique(source.labels)]


def _example(source: Source, name: str) -> str:
    return source.name(int(np.argmax(source.labels == list(source.classes).index(name))))


def _with_classes(source: Source, classes: list[str]) -> Source:
    if list(source.classes) == classes:
        return source
    number = {name: index for index, name in enumerate(classes)}
    numbers = np.array(
        [number.get(name, -1) for name in source.classes], dtype=np.int32
    )  # -1 of classes without an image
    return Relabelled(source, numbers[source.labels], classes)
