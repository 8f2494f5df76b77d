"""Pickles of arrays, lists and texts, read without running anything that they ask for."""

from __future__ import annotations

import mmap
import pickle
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {"u1": np.dtype(np.uint8), "i4": np.dtype("<i4"), "i8": np.dtype("<i8")}


def read_pickle(path: Path) -> dict[str, Any]:
    """A dictionary of arrays, lists, numbers and texts that Python 2 or 3 pickled; texts of Python 2 are bytes, but for the keys.

    A pickle names functions that reading it calls. Here none of them is: what NumPy's arrays name has a stand-in, made for this
    one file, that takes whole numbers of 8, 32 or 64 bits (`_stand_ins`), and whatever else is named is refused.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or cut short, or names something else, or holds something else than a dictionary.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            held = _Unpickler(content, encoding="bytes").load()
        if not isinstance(held, dict):
            raise _Refused(f"expected a dictionary, got {type(held).__name__}")
        return {_text(key): value.values if isinstance(value, _Array) else value for key, value in held.items()}
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # whatever a broken file leads the reading to, which may be to ask for much memory
        raise ValueError(
            f"{path}: damaged, or cut short: {str(error) or type(error).__name__}; get it again"
        ) from error


class _Refused(ValueError):
    """A pickle that names what is not needed for arrays, lists and texts."""


class _Array:
    """Stands in for an array while a pickle is read."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        self.values = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if by_columns else "C")


class _DType:
    """Stands in for a dtype while a pickle is read; its state has the byte order."""

    def __init__(self, name: str, *_: object) -> None:
        name = _text(name).lstrip("<|")
        if name not in _DTYPES:
            raise _Refused(f"expected arrays of {', '.join(_DTYPES)}, got one of {name!r}")
        self.dtype = _DTYPES[name]

    def __setstate__(self, state: tuple) -> None:
        if _text(state[1]) not in ("<", "|"):
            raise _Refused(f"expected an array with the lowest byte first, got the order {state[1]!r}")


class _Unpickler(pickle._Unpickler):
    """The reader that is written in Python: that in C makes room for whatever a damaged file claims, and can lose its footing."""

    def find_class(self, module: str, name: str) -> object:
        if (stand_in := _stand_ins().get((module.replace("numpy.core", "numpy._core"), name))) is None:
            raise _Refused(f"it asks for {module}.{name}, which no such data set needs; nothing was run")
        return stand_in


def _stand_ins() -> dict[tuple[str, str], object]:
    """Stand-ins for all that a pickled array names, by module and name. They are new classes at each call, as a pickle may set
    attributes on them."""

    class Array(_Array):
        pass

    class DType(_DType):
        pass

    def reconstruct(*_: object) -> _Array:
        return Array()

    def from_buffer(content: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
        array = Array()
        array.__setstate__((1, shape, dtype, order == "F", content))
        return array

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise _Refused(f"expected bytes written as latin1, got {encoding!r}")
        return text.encode("latin1")

    return {
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.numeric", "_frombuffer"): from_buffer,
        ("numpy", "ndarray"): "what `reconstruct` is given first",
        ("numpy", "dtype"): DType,
        ("_codecs", "encode"): encode,  # of bytes that Python 3 pickled for Python 2
    }


def _text(value: object) -> str:
    """Text that may have been pickled as bytes.

    Raises:
        _Refused: it is neither.
    """
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise _Refused(f"expected text, got {type(value).__name__}")
    return value
