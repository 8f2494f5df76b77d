"""From a shipped tile to a faster one: neighbours that give the same result are timed, the fastest is where to look next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.tiles import Tile, trial

LEAST_GAIN = 0.03

# How much two tiles' results may differ, a unit: the last place of what they round to, and for float32 that of sums of some
# ten thousand terms in two orders.
_UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-17}

_BOUNDS = {"BLOCK": (16, 256), "GROUP": (4, 16), "num_warps": (2, 8), "num_stages": (1, 5)}
# Float32 accumulators a thread, of 255 registers.
_MOST_ACCUMULATORS = 128


class Problem(NamedTuple):
    """A launch to be made faster: what it is, the dtype of its operands, and a call that does it and returns its results."""

    name: str
    dtype: torch.dtype
    run: Callable[[], tuple[Tensor, ...]]


# Milliseconds of each call, timed in turns.
Timer = Callable[[Sequence[Callable[[], object]]], list[float]]


@dataclass
class Finding:
    """What came of one key: the winner and its times beside the shipped tile's, summed over the key's problems."""

    key: tuple
    shipped: Tile
    tile: Tile
    shipped_ms: float | None = None
    ms: float | None = None
    tried: int = 0
    rejected: list[tuple[Tile, str]] = field(default_factory=list)
    out_of_time: bool = False


def neighbours(tile: Tile) -> list[dict[str, int]]:
    """Tiles one step away: a size halved or doubled, alone or with the warps, a stage more or less."""
    moves: list[dict[str, int]] = []
    for name, value in tile.items():
        if name == "num_stages":
            moves += [{name: value - 1}, {name: value + 1}]
        elif name in _BOUNDS or name.startswith("BLOCK_"):
            moves += [{name: value // 2}, {name: value * 2}]
        if name.startswith("BLOCK_"):
            moves += [{name: value // 2, "num_warps": tile["num_warps"] // 2}]
            moves += [{name: value * 2, "num_warps": tile["num_warps"] * 2}]
    return [moved for move in moves if _possible(moved := {**tile, **move}, move)]


def _possible(tile: Tile, changed: Tile) -> bool:
    """The changes are within bounds, and the largest product's accumulators fit the registers."""
    for name, value in changed.items():
        least, most = _BOUNDS["BLOCK" if name.startswith("BLOCK_") else name]
        if not least <= value <= most:
            return False
    sides = sorted(value for name, value in tile.items() if name.startswith("BLOCK_"))[-2:]
    return len(sides) < 2 or sides[0] * sides[1] <= _MOST_ACCUMULATORS * 32 * tile["num_warps"]


def keys_of(problem: Problem) -> dict[tuple, Tile]:
    """The keys that its launches select by, and their shipped tiles."""
    with trial({}) as selected:
        problem.run()
    return selected


def search(
    key: tuple,
    shipped: Tile,
    problems: Sequence[Problem],
    timer: Timer,
    seconds: float,
    tell: Callable[[Tile, str | None], None] = lambda tile, objection: None,
) -> Finding:
    """The tile for ``key`` that ``problems`` together take least time with, by steps that each gain 3%.

    The winner of many may be a lucky one: it has to win by 3% again, against the shipped tile alone.

    Args:
        seconds: no candidate is begun later than this.
        tell: hears of each candidate, and why it was rejected, or None.

    Raises:
        RuntimeError: a result of the shipped tile is not finite.
    """
    deadline = time.monotonic() + seconds
    expected = [_results(problem, key, shipped) for problem in problems]
    for problem, results in zip(problems, expected, strict=True):
        if not all(result.isfinite().all() for result in results):
            raise RuntimeError(f"{problem.name}: a result of the shipped tile is not finite")
    finding = Finding(key, shipped, shipped)
    seen, start = [shipped], None
    while start != finding.tile and not finding.out_of_time:
        start, sound = finding.tile, []
        for tile in neighbours(start):
            if tile in seen:
                continue
            finding.out_of_time = time.monotonic() >= deadline
            if finding.out_of_time:
                break
            seen.append(tile)
            if objection := _objection(key, tile, problems, expected):
                finding.rejected.append((tile, objection))
            else:
                sound.append(tile)
            tell(tile, objection)
        if sound:
            finding.tile, _, _ = _fastest(key, start, sound, problems, timer)
    finding.tried = len(seen) - 1
    if finding.tile != shipped:
        finding.tile, finding.shipped_ms, finding.ms = _fastest(key, shipped, [finding.tile], problems, timer)
    return finding


def _fastest(
    key: tuple, incumbent: Tile, others: Sequence[Tile], problems: Sequence[Problem], timer: Timer
) -> tuple[Tile, float, float]:
    """The fastest of ``others`` if it gains 3% over the incumbent, else the incumbent; the incumbent's time, and the winner's."""
    tiles = [incumbent, *others]
    times = [timer([_launch(problem, key, tile) for tile in tiles]) for problem in problems]
    totals = [sum(column) for column in zip(*times, strict=True)]
    best = min(range(len(tiles)), key=totals.__getitem__)
    if totals[best] > (1 - LEAST_GAIN) * totals[0]:
        best = 0
    return tiles[best], totals[0], totals[best]


def _launch(problem: Problem, key: tuple, tile: Tile) -> Callable[[], object]:
    def launch() -> None:
        with trial({key: tile}):
            problem.run()

    return launch


def _objection(
    key: tuple, tile: Tile, problems: Sequence[Problem], expected: Sequence[tuple[Tensor, ...]]
) -> str | None:
    """Why the tile cannot be taken: it does not compile or launch, or a result is not the shipped tile's."""
    for problem, truth in zip(problems, expected, strict=True):
        try:
            results = _results(problem, key, tile)
            off = [_difference(*pair) / _UNIT[problem.dtype] for pair in zip(results, truth, strict=True)]
        except Exception as error:  # compilers, ptxas and drivers each have their own
            return f"{problem.name}: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        for times in off:
            if not times <= 1.0:  # nor may it be NaN
                return f"{problem.name}: a wrong result, off by {times:.3g} times what rounding explains"
    return None


def _difference(found: Tensor, truth: Tensor) -> float:
    """The largest |found - truth| / (2 |truth| + 8 rms(truth)): two roundings, and eight of a typical element within the sum."""
    found, truth = found.float(), truth.float()
    scale = 2 * truth.abs() + 8 * truth.square().mean().sqrt()
    return ((found - truth).abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)).max().item()


def _results(problem: Problem, key: tuple, tile: Tile) -> tuple[Tensor, ...]:
    with _poisoned_memory(), trial({key: tile}):
        return problem.run()


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills ``torch.empty`` with NaN: memory that the previous tile filled would make one that writes nothing look right."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
