"""Images of a Hugging Face dataset, by the `datasets` library."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from crate_mae.data.reading import open_file, open_image
from crate_mae.data.source import MissingLibrary, Source, UnreadableImage

if TYPE_CHECKING:
    import datasets

_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_MARKS = ("dataset_dict.json", "state.json")  # in a folder that save_to_disk wrote


class HuggingFaceImages(Source):
    """One column of one split of a dataset, its images as they are stored.

    The library maps Arrow files into memory, so that even a large dataset needs little. It converts Parquet files to Arrow files
    once, in its cache ($HF_HOME), which needs as much disk again.

    Args:
        what: a dataset's name on the hub, a folder written by `save_to_disk`, a folder of .parquet or .arrow files, or one such
            file. A name on the hub is downloaded, unless it was before.
        split: the part.
        name: the configuration, where there are several.
        column: the column of images; by default the only one, or else the one named "image" or "img".

    Attributes:
        other_splits: the names of the other splits.

    Raises:
        MissingLibrary: an ImportError: the `datasets` library is not installed.
        OSError: nothing is there, or the hub cannot be reached.
        ValueError: there is no such split, configuration or column of images, none is the obvious one, or files are damaged.
    """

    def __init__(self, what: str, *, split: str = "train", name: str | None = None, column: str | None = None) -> None:
        self.what, self.split_name = what, split
        table, splits = _opened(what, split, name)
        self.column = _image_column(table.features, column, f"{what}[{split}]")
        self.classes, self._labels = _classes_and_labels(table)
        images = table.select_columns([self.column])
        if isinstance(images.features[self.column], _library().Image):
            images = images.cast_column(self.column, _library().Image(decode=False))
        self._images = images
        self.other_splits = [each for each in splits if each != split.partition("[")[0]]
        self._fingerprint = ""
        if not len(self):
            raise ValueError(f"{what}[{split}]: holds no image")

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        content, path = self._stored(index)
        if content is not None:
            return open_image(content, self._named(index, path))
        if path:
            return open_file(Path(path), self._named(index, path))
        raise UnreadableImage(self._named(index, path), "empty", f"there is nothing in column {self.column!r}")

    def name(self, index: int) -> str:
        try:
            return self._named(index, self._stored(index)[1])
        except UnreadableImage as error:
            return error.name

    def fingerprint(self) -> str:
        """A digest of the length of each image's bytes and the last part of its path, in their order. The library's own
        fingerprint depends on where its cache is, and on the times of local files."""
        if not self._fingerprint:
            self._fingerprint = _digest(self._images, self.column)
        return self._fingerprint

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int32) if self._labels is None else self._labels

    def remarks(self) -> list[str]:
        others = ", ".join(self.other_splits)
        return [f"of {self.what}, split {self.split_name}; left out: {others}; ,split=NAME names one"] * bool(others)

    def _named(self, index: int, path: str | None) -> str:
        return f"{self.what}[{self.split_name}] row {index}" + (f" ({path})" if path else "")

    def _stored(self, index: int) -> tuple[bytes | None, str | None]:
        """Content and path, either of which may be lacking."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            stored = self._images[index][self.column]
        except (OSError, ValueError) as error:
            raise UnreadableImage(self._named(index, None), "read error", str(error)) from error
        return (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)


def _library() -> Any:
    """The `datasets` module. It takes a second to import, so that only who uses it does.

    Raises:
        MissingLibrary: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingLibrary(
            f"Hugging Face datasets need the package datasets ({error}): pip install 'crate-kernels[data]'"
        ) from error
    return datasets


def _opened(what: str, split: str, name: str | None) -> tuple[datasets.Dataset, list[str]]:
    """The whole table of a split, and the names of all splits; what goes wrong in one line."""
    library, path = _library(), Path(what).expanduser()
    saved, file = any((path / mark).exists() for mark in _MARKS), path.is_file() and path.suffix in _FILES
    try:
        if name is not None and (saved or file):
            raise ValueError(f"name: there are no configurations to choose from, got {name!r}")
        if saved:
            return _saved(library.load_from_disk(str(path)), split)
        if file:
            table = library.load_dataset(_FILES[path.suffix], data_files={"train": str(path)}, split=split)
        elif path.is_file():
            raise ValueError(f"expected a file that ends in {' or '.join(_FILES)}, or a folder")
        elif what and path.exists():
            table = library.load_dataset(str(path), name, split=split)
        elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", what) or path.suffix in _FILES:
            raise FileNotFoundError("no such file or folder, and no name on the hub")
        else:
            table = library.load_dataset(what, name, split=split)
        return table, list(table.info.splits or {})
    except Exception as error:  # whatever the library, what it reads with and what it downloads with raise
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        kind = next((kind for kind in (FileNotFoundError, OSError) if isinstance(cause, kind)), ValueError)
        raise kind(f"cannot open the Hugging Face dataset {what}: {reason}") from error


def _saved(saved: Any, split: str) -> tuple[datasets.Dataset, list[str]]:
    """As `_opened`, for the result of `load_from_disk`, which is one split or several."""
    if isinstance(saved, dict):
        if split not in saved:
            raise ValueError(f"split: expected one of {', '.join(saved)}, got {split!r}")
        return saved[split], list(saved)
    if saved.split is not None and str(saved.split) != split:
        raise ValueError(f"split: expected {saved.split}, which was saved, got {split!r}")
    return saved, [split]


def _image_column(features: Any, column: str | None, of: str) -> str:
    """The name of the column that holds images: of the library's type, or if there is none, of bytes."""
    typed = [name for name, feature in features.items() if isinstance(feature, _library().Image)]
    of_bytes = [name for name, feature in features.items() if _holds_bytes(feature)]
    columns = f"{of} has the columns " + ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    if column is not None:
        if column not in typed + of_bytes:
            raise ValueError(f"column: expected one that holds images, got {column!r}; {columns}")
        return column
    found = typed or of_bytes
    named = [name for name in found if name in ("image", "img")]
    if len(found) != 1 and len(named) != 1:
        raise ValueError(f"column: {'several' if found else 'none'} may hold images, name one; {columns}")
    return (named if len(named) == 1 else found)[0]


def _holds_bytes(feature: Any) -> bool:
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(content, "dtype", None) in ("binary", "large_binary")


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _classes_and_labels(table: datasets.Dataset) -> tuple[list[str], np.ndarray | None]:
    """Sorted names and each image's; of a label that is lacking, as in a test set, the name is ""."""
    of_classes = [name for name, feature in table.features.items() if isinstance(feature, _library().ClassLabel)]
    named = [name for name in of_classes if name in ("label", "labels")]
    found = named if len(named) == 1 else of_classes
    if len(found) != 1:
        return [""], None
    numbers = table.select_columns(found).with_format("arrow")[:].column(0).fill_null(-1).to_numpy()
    names = [*table.features[found[0]].names, ""]
    classes = sorted(names if (numbers < 0).any() else names[:-1])
    own_number = np.searchsorted(classes, names).astype(np.int32)
    return classes, own_number[np.where(numbers < 0, -1, numbers)]


def _digest(images: datasets.Dataset, column: str) -> str:
    """Read from the lengths and paths of the Arrow table alone: what lies between them is left on the disk."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths, paths, rows = (hashlib.sha256() for _ in range(3))
    for chunk in images.data.column(column).chunks:
        parts = {"bytes": chunk}
        if pa.types.is_struct(chunk.type):
            parts = dict(zip([field.name for field in chunk.type], chunk.flatten(), strict=True))
        found = pc.fill_null(pc.binary_length(parts["bytes"]).cast(pa.int64()), -1)
        lengths.update(found.to_numpy(zero_copy_only=False).tobytes())
        if "path" in parts:
            last = pc.replace_substring_regex(pc.fill_null(parts["path"], ""), ".*/", "")
            paths.update("".join(f"{name}\n" for name in last.to_pylist()).encode())
    if images._indices is not None:  # rows that were chosen or shuffled, and not written anew
        for chunk in images._indices.column(0).chunks:
            rows.update(chunk.to_numpy(zero_copy_only=False).tobytes())
    digests = [str(len(images)), *(part.hexdigest() for part in (lengths, paths, rows))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
