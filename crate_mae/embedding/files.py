"""Files of features: .npz for NumPy, .parquet for tables. Both are written chunk by chunk, and read without running code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from crate_mae.data import MissingLibrary

SUFFIXES = (".npz", ".parquet")

_ABOUT, _CLASSES = b"crate_mae", b"classes"
"""Keys in the metadata of a Parquet file's schema; the values are JSON."""

_BEGAN = (1980, 1, 1, 0, 0, 0)
"""The date of every member of a .npz, so that the same features make the same file."""


class Embeddings(NamedTuple):
    """What a file of features holds.

    Attributes:
        features: float32 [images, width].
        names: of the images, as ``Source.name`` has them.
        labels: int64 [images], the number of each image's class; None where the images have no classes.
        classes: their names, by number; "" is that of images of no class among others.
        about: what the features are of: the model, its weights, which features, the images, the precision.
    """

    features: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    classes: list[str] | None
    about: dict[str, Any]


class Rows(NamedTuple):
    """Successive images of a file that is being written.

    Attributes:
        features: float32 [images, width].
        names, labels: as of ``Embeddings``.
    """

    features: np.ndarray
    names: list[str]
    labels: np.ndarray | None


class Shape(NamedTuple):
    """The sizes and descriptions that a file's header needs before its rows are written.

    Attributes:
        images, width: of the features.
        longest: length of the longest name in characters.
        classes, about: as of ``Embeddings``.
    """

    images: int
    width: int
    longest: int
    classes: list[str] | None
    about: dict[str, Any]


def check_format(path: Path) -> None:
    """Check the name of a file to write.

    Raises:
        ValueError: it does not end in one of ``SUFFIXES``.
        MissingLibrary: an ImportError: PyArrow is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"expected a name that ends in {' or '.join(SUFFIXES)}, got {path}")
    if path.suffix == ".parquet":
        _pyarrow(path)


def write(file: BinaryIO, path: Path, shape: Shape, chunks: Callable[[], Iterable[Rows]]) -> None:
    """Write an open file in the format that its path's suffix names, with one chunk at a time in memory.

    Args:
        chunks: returns all images in their order at each call.
    """
    {".npz": _write_npz, ".parquet": _write_parquet}[path.suffix](file, shape, chunks)


def read_embeddings(path: str | Path) -> Embeddings:
    """The features in a file that ``crate-mae embed`` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or damaged.
        MissingLibrary: an ImportError: PyArrow, which .parquet needs, is not installed.
    """
    path = Path(path)
    check_format(path)
    with path.open("rb") as file:
        try:
            found = (_read_npz if path.suffix == ".npz" else _read_parquet)(file)
            _check(found)
            return found
        except Exception as error:  # whatever a broken file leads the reading to
            raise ValueError(
                f"{path}: not a whole file of features, as crate-mae embed writes them ({error})"
            ) from error


def _write_npz(file: BinaryIO, shape: Shape, chunks: Callable[[], Iterable[Rows]]) -> None:
    """Write what ``np.savez`` would write; that function needs everything in memory."""
    text = f"<U{max(1, shape.longest)}"
    with zipfile.ZipFile(file, "w") as archive:

        def put(name: str, dtype: str, lengths: tuple[int, ...], arrays: Iterable[np.ndarray]) -> None:
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _BEGAN), "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": lengths}
                np.lib.format.write_array_header_1_0(member, header)
                for array in arrays:
                    member.write(array.astype(dtype, copy=False).tobytes())

        put("features", "<f4", (shape.images, shape.width), (rows.features for rows in chunks()))
        put("names", text, (shape.images,), (np.array(rows.names, text) for rows in chunks()))
        if shape.classes is not None:
            put("labels", "<i8", (shape.images,), (_labels_of(rows) for rows in chunks()))
            put("classes", *_whole(np.array(shape.classes)))
        put("about", *_whole(np.array(json.dumps(shape.about, allow_nan=False))))


def _labels_of(rows: Rows) -> np.ndarray:
    if rows.labels is None:
        raise ValueError("labels: expected one for each image, as the file has classes, got none")
    return rows.labels


def _whole(array: np.ndarray) -> tuple[str, tuple[int, ...], list[np.ndarray]]:
    return array.dtype.newbyteorder("<").str, array.shape, [array]


def _read_npz(file: BinaryIO) -> Embeddings:
    with np.load(file, allow_pickle=False) as held:
        classes = held["classes"].tolist() if "classes" in held else None
        labels = held["labels"] if classes is not None else None
        return Embeddings(held["features"], held["names"].tolist(), labels, classes, json.loads(str(held["about"])))


def _write_parquet(file: BinaryIO, shape: Shape, chunks: Callable[[], Iterable[Rows]]) -> None:
    """Write a row group for each chunk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = shape.classes
    of_classes = {} if classes is None else {"label": pa.int64(), "class": pa.string()}
    kinds = {"name": pa.string(), **of_classes, "features": pa.list_(pa.float32(), shape.width)}
    said = {_ABOUT: json.dumps(shape.about, allow_nan=False), _CLASSES: json.dumps(classes)}
    schema = pa.schema(kinds, metadata=said)
    with pq.ParquetWriter(file, schema, use_dictionary=["class"], write_page_checksum=True) as writer:
        for rows in chunks():
            if not rows.names:
                continue
            columns = {
                "name": rows.names,
                "features": pa.FixedSizeListArray.from_arrays(rows.features.ravel(), shape.width),
            }
            if classes is not None:
                labels = _labels_of(rows)
                columns |= {"label": labels, "class": [classes[label] for label in labels.tolist()]}
            writer.write_table(pa.table(columns, schema=schema))


def _read_parquet(file: BinaryIO) -> Embeddings:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, page_checksum_verification=True)
    said = table.schema_arrow.metadata or {}
    about, classes = json.loads(said[_ABOUT]), json.loads(said[_CLASSES])
    width = table.schema_arrow.field("features").type.list_size
    features = np.empty((table.metadata.num_rows, width), np.float32)
    names: list[str] = []
    labels = None if classes is None else np.empty(len(features), np.int64)
    for batch in table.iter_batches():
        here = slice(len(names), len(names) + len(batch))
        features[here] = batch["features"].flatten().to_numpy().reshape(-1, width)
        if labels is not None:
            labels[here] = batch["label"].to_numpy()
        names += batch["name"].to_pylist()
    return Embeddings(features, names, labels, classes, about)


def _check(found: Embeddings) -> None:
    """Raise a ValueError where the parts do not fit each other."""
    features, names, labels, classes, _ = found
    if features.dtype != np.float32 or features.ndim != 2:
        raise ValueError(f"features: expected float32 [images, width], got {features.dtype} {list(features.shape)}")
    lengths = {"names": len(names)} | ({} if labels is None else {"labels": len(labels)})
    for what, length in lengths.items():
        if length != len(features):
            raise ValueError(f"{what}: expected {len(features):,} of them, got {length:,}")
    if labels is not None and classes is not None and not ((labels >= 0) & (labels < len(classes))).all():
        raise ValueError(f"labels: expected numbers of {len(classes):,} classes, got {labels.min()} to {labels.max()}")


def _pyarrow(path: Path) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingLibrary(
            f"{path}: Parquet files need the package pyarrow ({error}): pip install 'crate-kernels[data]'"
        ) from error
