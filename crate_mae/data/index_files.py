"""Index files: arrays that took long to gather, kept for the next time, with a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from crate_mae.files import make_folder, replaced

_ABOUT, _CHECKSUM = "about", "crc32"


def cache_file(kind: str, of: str) -> Path:
    """Where the index of something of this kind is kept for this user: in $XDG_CACHE_HOME/crate_mae, or else ~/.cache/crate_mae.

    Args:
        kind: such as "folder".
        of: what is indexed, such as an absolute path.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "crate_mae")
    return root / f"{kind}_{hashlib.sha256(os.fsencode(of)).hexdigest()[:32]}.safetensors"


def write_index(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> bool:
    """`save_index`, which returns False where the file cannot be written.

    A full or read-only disk is no reason to stop: without an index, the arrays are gathered again.
    """
    with contextlib.suppress(OSError):
        make_folder(path.parent)
        save_index(path, arrays, about)
        return True
    return False


def save_index(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Write arrays to a file, with a checksum; an older file stays until the new one is complete.

    Several processes may write at once: each file is complete, and the last one stays.

    Raises:
        OSError: it cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # One entry, as safetensors writes several in an order that varies: the same index shall be the same bytes.
    text = json.dumps({**about, _CHECKSUM: str(_checksum(arrays, about))}, sort_keys=True)
    content = save(arrays, {_ABOUT: text})
    with replaced(path, alone=False) as file:
        file.write(content)


def read_index(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """The arrays and ``about``, as `save_index` was given them; None where there is no such file, or it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return (arrays, about) if about.pop(_CHECKSUM, None) == str(_checksum(arrays, about)) else None


def _checksum(arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> int:
    crc = zlib.crc32(repr(sorted(about.items())).encode())
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return crc
