"""Tile sizes. The package ships tables of them, keyed by device family; a machine may have a cache of its own.

A table is a plain dict ``{family: {(kernel, ...): {constexpr: value, num_warps, num_stages}}}``, with Triton's
``maxnreg`` where a tile needs it. The family ``"default"`` serves every device without an entry of its own; each entry of a table
has been compiled ahead of time (``benchmarks.ahead_of_time``).

``python -m crate_kernels.tune`` measures on this machine and writes the cache (``cache.py``), which goes before the tables.
Nothing is ever tuned while a model runs. Other tiles add numbers in another order, so all machines of a distributed
job must have the same cache, or none; ``check_same_on_all_ranks`` makes sure of that.
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
    """Choose tiles as on ``family``, such as "sm_90". So kernels are compiled ahead of time, on a machine without the device."""
    global _pretended
    previous, _pretended = _pretended, family
    try:
        yield
    finally:
        _pretended = previous


@contextmanager
def trial(tiles: Mapping[tuple, Tile]) -> Iterator[dict[tuple, Tile]]:
    """Launch with these tiles, by key, and with the shipped ones for other keys; the cache is not used.

    Yields the tiles that launches within the block select, by key.
    """
    global _trial
    previous, _trial = _trial, (tiles, {})
    try:
        yield _trial[1]
    finally:
        _trial = previous


def are_on_trial() -> bool:
    """Whether a block of ``pretend`` or ``trial`` is at work, in which the same launch may take other tiles than outside."""
    return _trial is not None or _pretended is not None


def family(device: torch.device) -> str:
    """The device family that tiles are chosen for: "sm_90" on an H100 or H200, "default" where there is no CUDA device."""
    return _pretended or _family(device)


@functools.cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent kernel has: one a multiprocessor. On a pretended device as many as on an H100; in Triton's
    interpreter so few that each goes through several tiles of a small result."""
    return 132 if _pretended else _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. ``triton.cdiv`` does the same, but takes the host as long as the checks of all arguments."""
    return -(-a // b)


def select(table: Table, device: torch.device, *key: Any) -> dict[str, int]:
    """The tile for ``key`` on ``device``: from the machine's cache, else from its family's entries, else from the default's.

    Raises:
        cache.CacheError: there is a cache, and it is damaged.
    """
    tile = dict(_look_up(table, device, key)[1])
    if _trial is not None:
        _trial[1][key] = tile
    return tile


def _look_up(table: Table, device: torch.device, key: tuple) -> tuple[str, Tile]:
    """The name of the place that the tile for ``key`` comes from, and the tile."""
    if _trial is not None and key in _trial[0]:
        return "trial", _trial[0][key]
    if not _trial and not _pretended and key in (tuned := cache.tuned(device)):
        return "cache", tuned[key]
    shipped = table.get(own := family(device), {})
    return (own, shipped[key]) if key in shipped else ("default", table["default"][key])


def naming_the_cache(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a launcher: if a kernel needs more than the device has, and there is a cache, the error names the cache.

    ``cache.load`` cannot find such a tile, because only the compiler knows what a kernel needs.

    Raises:
        cache.CacheError: by the launcher, in place of Triton's ``OutOfResources``.
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
    """For every key of every table, where its tile comes from ("cache", the family or "default"), and the tile."""
    return {
        key: _look_up(table, device, key)
        for table in cache.TABLES
        for key in dict.fromkeys([*table.get(family(device), {}), *table["default"]])
    }


def this_device() -> torch.device:
    """The current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def fingerprint(device: torch.device | None = None) -> str:
    """A hash of all tiles in force on ``device`` (``this_device`` if None)."""
    found = in_force(device or this_device())
    tiles = sorted(repr((key, sorted(tile.items()))) for key, (_, tile) in found.items())
    return hashlib.sha256("\n".join(tiles).encode()).hexdigest()[:16]


def check_same_on_all_ranks(device: torch.device | None = None) -> str:
    """The ``fingerprint`` of ``device``, compared with those of all ranks if there is a process group.

    It is a collective: every rank calls it, after ``init_process_group`` and ``torch.cuda.set_device``, before the first step.

    Raises:
        RuntimeError: on every rank, if ranks would launch different tiles, and so compute different bits.
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
