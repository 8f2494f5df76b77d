"""Which tiles a search tries from a tile."""

from __future__ import annotations

import itertools

from crate_kernels.tiles import Tile

# The values that the search tries, for each option of a tile.
_SIDES = (16, 32, 64, 128, 256)
_OPTIONS = {
    "GROUP": (4, 8, 16),
    "PARTS": (1, 2, 4, 8, 16),
    "LIBRARY": (0, 1),
    "PERSISTENT": (0, 1),
    "num_warps": (2, 4, 8),
    "num_stages": range(1, 9),
}
_MOST_ACCUMULATORS = 128  # float32 numbers in the registers of a thread, which has 255


def neighbours(tile: Tile) -> list[dict[str, int]]:
    """The tiles one step away that can be launched and that a thread's registers can hold.

    A step takes the next smaller or larger value of one option, or of a side of the tile and the number of warps together. A cap
    on registers is for the tile that it was found for: other tiles have none, and the tile without it is one of them.
    """
    capped, tile = "maxnreg" in tile, {name: value for name, value in tile.items() if name != "maxnreg"}
    moves = [(name,) for name in tile] + [(name, "num_warps") for name in tile if name.startswith("BLOCK_")]
    found: list[dict[str, int]] = [tile] if capped else []
    for names, step in itertools.product(moves, (-1, 1)):
        values = {name: _OPTIONS.get(name, _SIDES) for name in names}
        places = {name: values[name].index(tile[name]) + step for name in names}
        if all(0 <= place < len(values[name]) for name, place in places.items()):
            found.append({**tile, **{name: values[name][place] for name, place in places.items()}})
    return [other for other in found if _fits(other)]


def _fits(tile: Tile) -> bool:
    """Whether the accumulators of the largest product fit, that of the two longest sides. A library's product has no loop that
    could persist: such a tile would be another name for one that does not."""
    if tile.get("LIBRARY") and tile.get("PERSISTENT"):
        return False
    sides = sorted(value for name, value in tile.items() if name.startswith("BLOCK_"))[-2:]
    return len(sides) < 2 or sides[0] * sides[1] <= _MOST_ACCUMULATORS * 32 * tile["num_warps"]
