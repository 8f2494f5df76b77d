"""Tile sizes: one table an operator ships with the package, keyed by device family; a machine may have its own.

A table is a plain dict ``{family: {(kernel, ...key): {constexpr: value, num_warps, num_stages}}}``. The family
``"default"`` serves every device without a table of its own; the ahead-of-time gate proves each entry by compiling it.
``python -m crate_kernels.tune`` measures on this machine and writes a cache (``cache.py``) that goes before the tables;
operators that run never tune. Other tiles sum in another order: all machines of one job must have the same cache, or none,
which ``check_same_on_all_ranks`` tells.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from crate_kernels.tiles import cache

Tile = Mapping[str, int]
Table = Mapping[str, Mapping[tuple, Tile]]

_pretended: str | None = None
_trial: tuple[Mapping[tuple, Tile], dict[tuple, Tile]] | None = None


@contextmanager
def pretend(family: str) -> Iterator[None]:
    """Choose tiles as if running on ``family`` ("sm_90"): how kernels are compiled ahead of time without a device."""
    global _pretended
    previous, _pretended = _pretended, family
    try:
        yield
    finally:
        _pretended = previous


@contextmanager
def trial(tiles: Mapping[tuple, Tile]) -> Iterator[dict[tuple, Tile]]:
    """Launch with ``tiles``, by key, and else with the shipped ones, cache or no cache. Yields what was selected, by key."""
    global _trial
    previous, _trial = _trial, (tiles, {})
    try:
        yield _trial[1]
    finally:
        _trial = previous


def family(device: torch.device) -> str:
    """The device family tiles are chosen for: "sm_90" on an H100 or H200, "default" where there is no CUDA device."""
    return _pretended or _family(device)


@functools.cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def cdiv(a: int, b: int) -> int:
    """How many of b cover a. Triton's own is made for kernels, and takes the host as long as a check of all arguments."""
    return -(-a // b)


def select(table: Table, device: torch.device, *key: Any) -> dict[str, int]:
    """The launch options for ``key`` on ``device``: the machine's cache, else its family's entry, else the default's.

    Raises:
        cache.CacheError: there is a cache, and it cannot be read.
    """
    tile = dict(_look_up(table, device, key)[1])
    if _trial is not None:
        _trial[1][key] = tile
    return tile


def _look_up(table: Table, device: torch.device, key: tuple) -> tuple[str, Tile]:
    """Where the tile for ``key`` comes from, and the tile."""
    if _trial is not None and key in _trial[0]:
        return "trial", _trial[0][key]
    if not _trial and not _pretended and key in (tuned := cache.tuned(device)):
        return "cache", tuned[key]
    shipped = table.get(own := family(device), {})
    return (own, shipped[key]) if key in shipped else ("default", table["default"][key])


def naming_the_cache(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that blames the machine's cache where a kernel needs more than the device has, and there is a cache.

    Raises:
        cache.CacheError: so it is; what ``cache.load`` cannot tell without a compiler.
    """

    @functools.wraps(launcher)
    def launch(*arguments: Any, **options: Any) -> Any:
        try:
            return launcher(*arguments, **options)
        except Exception as error:
            device = this_device()
            if type(error).__name__ != "OutOfResources" or _trial or _pretended or not cache.tuned(device):
                raise
            raise cache.CacheError(
                f"{cache.location(device)}: a tile of this cache needs more than the device has ({error}) Run "
                "`python -m crate_kernels.tune --clear`, or tune again"
            ) from error

    return launch


def in_force(device: torch.device) -> dict[tuple, tuple[str, Tile]]:
    """Of every key of every table: "cache", the family or "default", and the tile that launches take from there."""
    return {
        key: _look_up(table, device, key)
        for table in cache.TABLES
        for key in dict.fromkeys([*table.get(family(device), {}), *table["default"]])
    }


def this_device() -> torch.device:
    """The current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def fingerprint(device: torch.device | None = None) -> str:
    """A hash of the tiles in force on ``device`` (``this_device`` if None): equal where all tiles are."""
    found = in_force(device or this_device())
    tiles = sorted(repr((key, sorted(tile.items()))) for key, (_, tile) in found.items())
    return hashlib.sha256("\n".join(tiles).encode()).hexdigest()[:16]


def check_same_on_all_ranks(device: torch.device | None = None) -> str:
    """The ``fingerprint`` of ``device``, compared with those of all ranks where there is a process group.

    A collective: every rank calls it, after ``init_process_group`` and ``torch.cuda.set_device``, before the first step.

    Raises:
        RuntimeError: on every rank, where ranks would launch different tiles and so compute different bits.
    """
    own = fingerprint(device)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    if len(set(found)) > 1:
        ranks = {one: [rank for rank, other in enumerate(found) if other == one] for one in found}
        raise RuntimeError(
            f"ranks have different tiles in force: {'; '.join(f'{one} on ranks {of}' for one, of in ranks.items())}. Give "
            f"every machine the same cache ({cache.VARIABLE} names its file), or none: python -m crate_kernels.tune --clear"
        )
    return own
