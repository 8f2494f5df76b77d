"""Oxford-IIIT Pets.

O. M. Parkhi, A. Vedaldi, A. Zisserman and C. V. Jawahar, "Cats and Dogs", CVPR 2012;
https://www.robots.ox.ac.uk/~vgg/data/pets/ has images and annotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crate_mae.data.layouts.layout import Layout
from crate_mae.data.layouts.listed import ListedImages

_CLASSES = 37
_LISTS = {"train": "trainval.txt", "test": "test.txt"}


def _read(root: Path, parts: Sequence[str]) -> ListedImages:
    """A class has the name of its images without their numbers, "Abyssinian" of "Abyssinian_100"; OSError and ValueError as of
    `Layout.read`."""
    breeds: dict[int, str] = {}
    listed = {part: _listed(root / "annotations" / name, breeds) for part, name in _LISTS.items()}
    chosen = [image for part in parts for image in listed[part]]
    classes = [breeds.get(number, str(number)) for number in range(1, max(breeds) + 1)]
    files, labels = [f"{name}.jpg" for name, _ in chosen], [number - 1 for _, number in chosen]
    return ListedImages(root / "images", files, labels, classes, PETS.about(parts, len(files)))


def _listed(path: Path, breeds: dict[int, str]) -> list[tuple[str, int]]:
    """The images of a list with the numbers of their classes, whose names are added to `breeds`."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *numbers = line.split()
        if len(numbers) != 3 or not all(each.isascii() and each.isdigit() for each in numbers) or "/" in name:
            raise ValueError(
                f"{path}, line {number}: expected an image, its class, species and breed, such as Abyssinian_100 1 1 1, "
                f"got {line!r}"
            )
        label, breed = int(numbers[0]), name.rpartition("_")[0] or name
        if not 1 <= label <= _CLASSES:
            raise ValueError(f"{path}, line {number}: expected a class of 1 to {_CLASSES}, got {label}")
        if breeds.setdefault(label, breed) != breed or list(breeds.values()).count(breed) > 1:
            raise ValueError(f"{path}, line {number}: expected one name for each class, got {breed} and others")
        found.append((name, label))
    if not found:
        raise ValueError(f"{path}: expected a line for each image, got none; get it again")
    return found


PETS = Layout(
    "Oxford-IIIT Pets", "oxford-iiit-pet", ("annotations/trainval.txt",), {"train": 3_680, "test": 3_669}, _read
)
