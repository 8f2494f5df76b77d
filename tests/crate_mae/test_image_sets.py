"""Which folder a run trains on, and which it validates on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from crate_mae.data import ImageFolder, Source
from crate_mae.training import ImagesConfig, PretrainConfig
from crate_mae.training.image_sets import image_sets

PLAIN = PretrainConfig(out=Path("run"))


def make(root: Path, folders: str) -> Path:
    """Two photographs in a class of each folder named."""
    for name in folders.split():
        (root / name / "class").mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8)).save(root / name / "class" / f"{index}.png")
    return root


def folders_used(root: Path, **options: object) -> tuple[str, str | None, str]:
    """The folders trained and validated on, relative to `root`, and what is said of them."""
    sets = image_sets(dataclasses.replace(PLAIN, **options))
    train, val = (source and str(folder_of(source).relative_to(root)) for source in sets[:2])
    return train, val, "; ".join(sets.said)


def folder_of(source: Source) -> Path:
    """Of images that may be decoded, or a part."""
    while not isinstance(source, ImageFolder):
        source = source.source
    return source.root


@pytest.mark.parametrize(
    ("held", "train", "val", "said"),
    [
        ("train val", "train", "val", "train/ to train on, val/ to validate on"),
        ("train val test", "train", "val", "train/ to train on, val/ to validate on, test/ left out"),
        ("Training validation", "Training", "validation", "Training/ to train on, validation/ to validate on"),
        ("train valid .cache", "train", "valid", "valid/ to validate on"),
        ("train test", "train", "train", "train/ to train on, test/ left out"),  # val is a part of train held out
        ("train", "train", "train", "train/ to train on"),
        ("train bus plane", ".", ".", ""),  # classes
        ("val test", ".", ".", ""),
        ("a b", ".", ".", ""),
    ],
)
def test_the_parts_of_a_data_set_are_told_apart(tmp_path, held, train, val, said):
    used = folders_used(make(tmp_path, held), data=tmp_path)
    assert used[:2] == (train, val)
    assert used[2] == "" if not said else used[2].startswith(f"of {tmp_path}, ") and said in used[2]


def test_a_part_held_out_is_of_the_training_part(tmp_path):
    config = dataclasses.replace(PLAIN, data=make(tmp_path, "train test"), images=ImagesConfig(val_fraction=0.5))
    train, val, *_ = image_sets(config)
    assert (len(train), len(val)) == (1, 1)
    assert image_sets(dataclasses.replace(config, images=ImagesConfig(val_fraction=0.0))).val is None


def test_a_folder_to_validate_on_may_be_named(tmp_path):
    make(tmp_path, "inet/train inet/val other")
    inet, other = tmp_path / "inet", tmp_path / "other"
    assert folders_used(tmp_path, data=inet, val=other)[:2] == ("inet/train", "other")
    assert "val/ left out" in folders_used(tmp_path, data=inet, val=other)[2]
    assert folders_used(tmp_path, data=inet / "train", val=inet) == ("inet/train", "inet/val", "")
    assert folders_used(tmp_path, data=inet, val=inet)[:2] == ("inet/train", "inet/val")


@pytest.mark.parametrize(
    ("held", "option", "says"),
    [
        ("train val extra", "data", "--data: .*: it holds train, val, extra; name"),
        ("train val validation", "data", "--data: .*: it holds train, val, validation; name"),
        ("train test", "val", "--val: .*: it holds train, test; name the one to validate on"),
    ],
)
def test_parts_that_could_be_meant_otherwise_are_named(tmp_path, held, option, says):
    options = {"data": make(tmp_path / "a", "x"), option: make(tmp_path / "b", held)}
    with pytest.raises(ValueError, match=says):
        folders_used(tmp_path, **options)
