"""The cache: a JSON file with the tiles that ``python -m crate_kernels.tune`` found to be faster on this machine.

A process reads it once, at its first launch. It is used only with the device, the version of Triton, the version of this package
and the shipped tables that it was made with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crate_kernels._version import __version__
from crate_kernels.files import write_json
from crate_kernels.tiles import products, shared_attention

VARIABLE = "CRATE_KERNELS_CACHE"
TABLES = (products.TABLE, shared_attention.TABLE)

_BEGINNING = b'{"for":{"device":'  # how every file of ``write`` begins, white space left out
_MOST_BYTES = 2**20  # fifty times what all tables take


class CacheError(RuntimeError):
    """A cache that cannot be used. The message is one line that names the file and what to do about it."""


def location(device: torch.device) -> Path:
    """The file that CRATE_KERNELS_CACHE names, else one for devices of this name in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    name = re.sub(r"\W+", "_", _device_name(device))
    return _own_folder() / f"tiles-{name}.json"


def _own_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "crate_kernels")


def identity(device: torch.device) -> dict[str, str]:
    """What a cache must have been made with to be used on ``device``."""
    import triton

    return {
        "device": _device_name(device),
        "triton": triton.__version__,
        "crate_kernels": __version__,
        "tables": hashlib.sha256(repr(TABLES).encode()).hexdigest()[:16],
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def tuned(device: torch.device) -> dict[tuple, dict[str, int]]:
    """The tiles that launches on ``device`` take from its cache: ``load``, once a process."""
    return load(location(device), device)


def load(file: Path, device: torch.device) -> dict[tuple, dict[str, int]]:
    """The tiles for ``device``, by key. Empty without a file and, with a warning, where it was made with something else.

    Raises:
        CacheError: the file is no cache, or was changed since it was written.
    """
    made_with, tiles = read(file)
    own = identity(device) if made_with else {}
    if differing := [name for name in own if made_with.get(name) != own[name]]:
        found = "; ".join(f"{name} {made_with.get(name)}, not {own[name]}" for name in differing)
        warnings.warn(
            f"{file}: tuned for {found}. Shipped tiles are used instead. "
            "`python -m crate_kernels.tune` tunes again, with --clear it removes the file",
            stacklevel=2,
        )
        return {}
    return tiles


def read(file: Path) -> tuple[dict[str, str], dict[tuple, dict[str, int]]]:
    """What a cache was made with, and its tiles by key, for whatever device it is; both are empty without a file.

    Raises:
        CacheError: the file is no cache, or was changed since it was written.
    """
    if (text := _content(file)) is None:
        return {}, {}
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("sha256", None) != _checksum(content):
            raise ValueError("its checksum is not that of its content")
    except (ValueError, RecursionError) as error:
        raise _error(file, f"{type(error).__name__}: {error}", clearable=_is_own(file, text)) from error
    return content["for"], {tuple(key): tile for key, tile in content["tiles"]}


def clear(file: Path) -> bool:
    """Delete a cache, also a damaged one. False where there is none.

    Raises:
        CacheError: the file is something else, or cannot be deleted.
    """
    if (text := _content(file)) is None:
        return False
    if not _is_own(file, text):
        read(file)  # raises, unless it is a whole cache in another order
    try:
        file.unlink()
    except OSError as error:
        raise CacheError(f"{file}: cannot be deleted ({error.strerror})") from error
    return True


def write(file: Path, tiles: Mapping[tuple, Mapping[str, int]], device: torch.device) -> None:
    """Save tiles for ``device``, by key. A process that starts meanwhile reads the old file or the new one.

    Raises:
        OSError: the file could not be written; the message names it.
    """
    content: dict[str, Any] = {"for": identity(device), "tiles": list(tiles.items())}
    content["sha256"] = _checksum(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content, alone=False)


def _checksum(content: dict[str, Any]) -> str:
    """By which damage is found, and that another program wrote or changed the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(file: Path) -> bytes | None:
    """The bytes of a file, or None without one. Nothing but a regular file is opened: a pipe would wait for ever.

    Raises:
        CacheError: it is no regular file, cannot be read, or is larger than any cache.
    """
    try:
        found = os.stat(file)
        why = f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "no regular file"
        if stat.S_ISREG(found.st_mode) and found.st_size <= _MOST_BYTES:
            return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why = str(error.strerror)
    raise _error(file, why, clearable=False)


def _is_own(file: Path, text: bytes) -> bool:
    """Whether ``write`` wrote the file, by its place or its beginning; the rest may be damaged or missing."""
    in_place = file.parent == _own_folder() and file.name.startswith("tiles-")
    return in_place or _BEGINNING.startswith(b"".join(text.split())[: len(_BEGINNING)])


def _error(file: Path, why: str, clearable: bool) -> CacheError:
    remedy = "Delete the file, or run `python -m crate_kernels.tune --clear`"
    if not clearable:  # it may be a file of value, which the variable names by mistake
        remedy = f"Have {VARIABLE} name another file"
    return CacheError(f"{file}: not a readable cache of tiles ({why[:300]}). {remedy}")
