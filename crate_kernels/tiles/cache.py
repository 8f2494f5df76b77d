"""The tiles that ``python -m crate_kernels.tune`` found for this machine: a JSON file, read once a process at the first launch.

It counts only for the device, the Triton, the package and the shipped tables that it was made with.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crate_kernels._version import __version__

VARIABLE = "CRATE_KERNELS_CACHE"


class CacheError(RuntimeError):
    """A cache that cannot be read; the message names the file and how to be rid of it."""


def tables() -> dict[str, Mapping]:
    """The shipped tables, by operator."""
    package = sys.modules[__package__]
    modules = {
        info.name: importlib.import_module(f"{__package__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    }
    return {name: module.TABLE for name, module in modules.items() if hasattr(module, "TABLE")}


def location(device: torch.device) -> Path:
    """The file named by CRATE_KERNELS_CACHE, else one for devices of this name in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    name = re.sub(r"\W+", "_", _device_name(device))
    return _folder() / f"tiles-{name}.json"


def locations() -> list[Path]:
    """Where caches of any device are: the file named by CRATE_KERNELS_CACHE, else those in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return [Path(named)]
    return sorted(_folder().glob("tiles-*.json"))


def _folder() -> Path:
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "crate_kernels")


def identity(device: torch.device) -> dict[str, str]:
    """What a cache must have been made with to count on ``device``."""
    import triton

    entries = [
        repr((name, family, key, sorted(tile.items())))
        for name, table in tables().items()
        for family, tiles in table.items()
        for key, tile in tiles.items()
    ]
    shipped = hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[:16]
    return {
        "device": _device_name(device),
        "triton": triton.__version__,
        "crate_kernels": __version__,
        "tables": shipped,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def tuned(device: torch.device) -> dict[tuple, dict[str, int]]:
    """The cached tiles for ``device``, by key. Empty where there is no cache, or, with a warning, one that does not count."""
    return {tuple(entry["key"]): entry["tile"] for entry in entries(location(device), device)}


def entries(file: Path, device: torch.device) -> list[dict[str, Any]]:
    """Key, tile and times of what ``file`` holds for ``device``; see ``tuned``.

    Raises:
        CacheError: the file is there, and is no cache.
    """
    if not os.path.exists(file):
        return []
    content = read(file)
    expected = identity(device)
    differing = [
        f"{name} {content['for'].get(name)}, not {own}"
        for name, own in expected.items()
        if content["for"].get(name) != own
    ]
    if differing:
        warnings.warn(
            f"{file}: tuned for {'; '.join(differing)}. Shipped tiles are used instead. "
            "`python -m crate_kernels.tune` tunes again, with --clear it removes the file",
            stacklevel=2,
        )
        return []
    return content["tiles"]


def read(file: Path) -> dict[str, Any]:
    """What ``write`` wrote, whatever device and versions it is for.

    Raises:
        CacheError: the file is no cache.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content["for"], dict):
            raise TypeError("'for' is no object")
        for entry in content["tiles"]:
            key, tile = entry["key"], entry["tile"]
            if not (isinstance(key, list) and key and all(isinstance(part, (str, int)) for part in key)):
                raise TypeError(f"key {key!r}: expected a list of names and numbers")
            if not (
                isinstance(tile, dict) and tile and all(type(value) is int and value > 0 for value in tile.values())
            ):
                raise TypeError(f"tile {tile!r} of {key}: expected positive whole numbers by name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{file}: not a readable cache of tiles ({type(error).__name__}: {error}). Delete the file, or run "
            "`python -m crate_kernels.tune --clear`"
        ) from error
    return content


def write(file: Path, content: Mapping[str, Any]) -> None:
    """All of it or nothing: a process that starts meanwhile reads the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2)
            stream.write("\n")
        os.chmod(unfinished, 0o644)  # a cache may be shared; mkstemp's files are the owner's alone
        os.replace(unfinished, file)
    except BaseException:
        os.unlink(unfinished)
        raise
