"""The tiles that ``python -m crate_kernels.tune`` found for this machine: a JSON file, read once a process at the first launch.

It counts only for the device, the Triton, the package and the shipped tables that it was made with.
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

import torch

from crate_kernels._version import __version__
from crate_kernels.tiles import products, shared_attention

VARIABLE = "CRATE_KERNELS_CACHE"
TABLES = (products.TABLE, shared_attention.TABLE)

# Least and most of each option, _SIDES of a side of a tile: somewhat more than the search tries. Whether a tile fits the
# registers and the shared memory of a device, its launch tells.
_BOUNDS = {"GROUP": (1, 64), "PARTS": (1, 8), "LIBRARY": (0, 1), "num_warps": (1, 16), "num_stages": (1, 8)}
_SIDES = (16, 512)

_BEGINNING = b'{"for":{"device":'  # of what ``write`` writes, but for the spaces
_MOST_BYTES = 2**20  # fifty times all tables


class CacheError(RuntimeError):
    """A cache that cannot be read; the message names the file and how to be rid of it, in one line."""


def location(device: torch.device) -> Path:
    """The file named by CRATE_KERNELS_CACHE, else one for devices of this name in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    name = re.sub(r"\W+", "_", _device_name(device))
    return _own_folder() / f"tiles-{name}.json"


def _own_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "crate_kernels")


def identity(device: torch.device) -> dict[str, str]:
    """What a cache must have been made with to count on ``device``."""
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
    """What ``load`` finds where the cache for ``device`` lies; read once."""
    return load(location(device), device)


def load(file: Path, device: torch.device) -> dict[tuple, dict[str, int]]:
    """The tiles for ``device``, by key. Empty where there is no file, or, with a warning, one that does not count.

    Raises:
        CacheError: the file is there, and is no cache; or it counts, and no kernel can be launched with one of its tiles.
    """
    made_for, tiles = read(file)
    if not made_for:
        return {}
    own = identity(device)
    differing = [f"{name} {made_for.get(name)}, not {own[name]}" for name in own if made_for.get(name) != own[name]]
    if not differing:
        for key, tile in tiles.items():
            if objection := _objection(key, tile):
                raise CacheError(_not_readable(file, f"{key}: {objection}", clearable=True))
        return tiles
    warnings.warn(
        f"{file}: tuned for {'; '.join(differing)}. Shipped tiles are used instead. "
        "`python -m crate_kernels.tune` tunes again, with --clear it removes the file",
        stacklevel=2,
    )
    return {}


def read(file: Path) -> tuple[dict[str, str], dict[tuple, dict[str, int]]]:
    """The identity that ``write`` wrote, and the tiles by key, whatever device and versions they are for; empty without a file.

    Raises:
        CacheError: the file is no cache.
    """
    if (text := _content(file)) is None:
        return {}, {}
    try:
        content = json.loads(text)
        made_for, pairs = dict(content["for"]), [(tuple(key), dict(tile)) for key, tile in content["tiles"]]
        tiles = dict(pairs)
        if not made_for or not all(isinstance(value, str) and value.isprintable() for value in made_for.values()):
            raise ValueError(f"for: expected texts, got {made_for}")
        for key, tile in pairs:
            if not all(type(value) is int and value >= 0 for value in tile.values()):
                raise ValueError(f"{key}: {tile}: expected whole numbers")
        if len(tiles) < len(pairs):
            raise ValueError("two tiles for one key")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(_not_readable(file, f"{type(error).__name__}: {error}", _is_own(file, text))) from error
    return made_for, tiles


def clear(file: Path) -> bool:
    """Delete a cache, whole or broken. False where there is none.

    Raises:
        CacheError: the file is something else, or cannot be deleted.
    """
    if (text := _content(file)) is None:
        return False
    if not _is_own(file, text):
        read(file)  # a cache in another order is one
    try:
        file.unlink()
    except OSError as error:
        raise CacheError(f"{file}: cannot be deleted ({error.strerror})") from error
    return True


def _content(file: Path) -> bytes | None:
    """What is in a file, if one is there. To open a pipe would wait for ever, and some devices never end.

    Raises:
        CacheError: it is no file, or out of reach, or larger than any cache.
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
    raise CacheError(_not_readable(file, why, clearable=False))


def _is_own(file: Path, text: bytes) -> bool:
    """Whether ``write`` wrote the file, as far as its place and its beginning tell; it may be broken, or cut off."""
    in_place = file.parent == _own_folder() and file.name.startswith("tiles-")
    return in_place or _BEGINNING.startswith(b"".join(text.split())[: len(_BEGINNING)])


def _not_readable(file: Path, why: str, clearable: bool) -> str:
    rid = "Delete the file, or run `python -m crate_kernels.tune --clear`"
    return f"{file}: not a readable cache of tiles ({why[:300]}). {rid if clearable else f'Have {VARIABLE} name another file'}"


def _objection(key: tuple, tile: Mapping[str, int]) -> str | None:
    """Why no kernel can be launched with the tile, as far as can be told without a compiler."""
    shipped = next((of[key] for table in TABLES for of in table.values() if key in of), None)
    if shipped is None:
        return "no kernel has this key"
    if tile.keys() != shipped.keys():
        return f"expected {', '.join(shipped)}, got {', '.join(map(ascii, tile))}"
    for name, value in tile.items():
        (least, most), power = _BOUNDS.get(name, _SIDES), name not in ("LIBRARY", "num_stages")
        if not least <= value <= most or (power and value & (value - 1)):
            return f"{name}: expected a {'power of 2' if power else 'number'} from {least} to {most}, got {value}"
    return None


def write(file: Path, tiles: Mapping[tuple, Mapping[str, int]], device: torch.device) -> None:
    """All of it or nothing: a process that starts meanwhile reads the old file or the new one."""
    text = json.dumps({"for": identity(device), "tiles": list(tiles.items())}, indent=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as output:
            output.write(text + "\n")
            output.flush()
            os.fsync(output.fileno())  # else a power cut may leave the new name with nothing in it
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
