"""The tiles that ``python -m crate_kernels.tune`` found for this machine: a JSON file, read once a process at the first launch.

It counts only for the device, the Triton, the package and the shipped tables that it was made with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from crate_kernels._version import __version__
from crate_kernels.tiles import products, shared_attention

VARIABLE = "CRATE_KERNELS_CACHE"
TABLES = (products.TABLE, shared_attention.TABLE)


class CacheError(RuntimeError):
    """A cache that cannot be read; the message names the file and how to be rid of it."""


def location(device: torch.device) -> Path:
    """The file named by CRATE_KERNELS_CACHE, else one for devices of this name in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    name = re.sub(r"\W+", "_", _device_name(device))
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "crate_kernels", f"tiles-{name}.json").expanduser()


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
        CacheError: the file is there, and is no cache.
    """
    if not file.exists():
        return {}
    made_for, tiles = read(file)
    own = identity(device)
    differing = [f"{name} {made_for.get(name)}, not {own[name]}" for name in own if made_for.get(name) != own[name]]
    if not differing:
        return tiles
    warnings.warn(
        f"{file}: tuned for {'; '.join(differing)}. Shipped tiles are used instead. "
        "`python -m crate_kernels.tune` tunes again, with --clear it removes the file",
        stacklevel=2,
    )
    return {}


def read(file: Path) -> tuple[dict[str, str], dict[tuple, dict[str, int]]]:
    """The identity that ``write`` wrote, and the tiles by key, whatever device and versions they are for.

    Raises:
        CacheError: the file is no cache.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        made_for, tiles = dict(content["for"]), {tuple(key): dict(tile) for key, tile in content["tiles"]}
        for key, tile in tiles.items():
            if not all(type(value) is int and value >= 0 for value in tile.values()):
                raise ValueError(f"{key}: {tile}: expected whole numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{file}: not a readable cache of tiles ({type(error).__name__}: {error}). Delete the file, or run "
            "`python -m crate_kernels.tune --clear`"
        ) from error
    return made_for, tiles


def write(file: Path, tiles: Mapping[tuple, Mapping[str, int]], device: torch.device) -> None:
    """All of it or nothing: a process that starts meanwhile reads the old file or the new one."""
    text = json.dumps({"for": identity(device), "tiles": list(tiles.items())}, indent=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
