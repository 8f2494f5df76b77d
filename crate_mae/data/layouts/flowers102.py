"""Oxford Flowers-102.

M.-E. Nilsback and A. Zisserman, "Automated Flower Classification over a Large Number of Classes", ICVGIP 2008;
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ has the images, their labels and the lists of the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crate_mae.data.layouts.layout import Layout
from crate_mae.data.layouts.listed import ListedImages
from crate_mae.data.source import MissingLibrary

_CLASSES = 102
_LISTS = {"train": "trnid", "val": "valid", "test": "tstid"}


def _read(root: Path, parts: Sequence[str]) -> ListedImages:
    """The classes have no names in the files: they are "1" to "102", of label 0 to 101.

    Raises:
        MissingLibrary: an ImportError: SciPy is not installed.
        OSError, ValueError: as of `Layout.read`.
    """
    setid, imagelabels = root / "setid.mat", root / "imagelabels.mat"
    (labels,) = _numbers(imagelabels, ["labels"], _CLASSES)
    lists = dict(zip(_LISTS, _numbers(setid, list(_LISTS.values()), len(labels)), strict=True))
    every = np.concatenate(list(lists.values()))
    if len(np.unique(every)) < len(every):
        raise ValueError(f"{setid}: expected each image in one list, once, got one that is listed again")
    chosen = np.concatenate([lists[part] for part in parts])
    if not len(chosen):
        raise ValueError(f"{setid}: {' and '.join(_LISTS[part] for part in parts)}: expected an image, got none")
    files = [f"image_{number:05}.jpg" for number in chosen.tolist()]
    classes = [str(number) for number in range(1, _CLASSES + 1)]
    return ListedImages(root / "jpg", files, labels[chosen - 1] - 1, classes, FLOWERS102.about(parts, len(files)))


def _numbers(path: Path, names: Sequence[str], most: int) -> list[np.ndarray]:
    """Arrays of a MATLAB file, each int64 [numbers] of 1 to `most`."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingLibrary(f"{path}: MATLAB files need the package scipy ({error}): pip install '.[data]'") from error
    try:
        with open(path, "rb") as file:
            held = loadmat(file, variable_names=names)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    except Exception as error:  # whatever a broken file leads the reading to
        kind = OSError if isinstance(error, OSError) and error.errno else ValueError
        raise kind(f"{path}: no MATLAB file that can be read, or cut short: {error}") from error
    found = []
    for name in names:
        numbers = held.get(name)
        if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in "uif":
            raise ValueError(f"{path}: {name}: expected an array of numbers, and there is none")
        whole = numbers.ravel().astype(np.int64)
        if (strange := np.flatnonzero((numbers.ravel() != whole) | (whole < 1) | (whole > most))).size:
            raise ValueError(
                f"{path}: {name}: expected whole numbers of 1 to {most}, got {numbers.ravel()[strange[0]]}"
            )
        found.append(whole)
    return found


FLOWERS102 = Layout(
    "Oxford Flowers-102", "flowers-102", ("setid.mat",), {"train": 1_020, "val": 1_020, "test": 6_149}, _read
)
