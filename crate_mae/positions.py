"""Positions for any grid of patches: fixed sines and cosines, and learned ones resampled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sine_cosine(grid: tuple[int, int], width: int) -> Tensor:
    """Positions [1, 1 + rows * columns, width], float32: a zero row for the class token, then the patches row by row.

    The first half of the width encodes the column, the second half the row, each as sines then cosines at the
    frequencies 10000 ** (-i / (width / 4)) (the MAE convention, facebookresearch/mae). ``width`` is a multiple of 4.
    """
    rows, columns = grid
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([patches.new_zeros(1, width), patches]).float().unsqueeze(0)


def resampled(positions: Tensor, old_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Learned positions [1, 1 + rows * columns, width], resampled from ``old_grid`` to ``grid``; the class token's is kept.

    As in timm's ``resample_abs_pos_embed``: bicubic, antialiased, computed in float32 or wider, returned in the given dtype.
    """
    of_class, of_patches = positions[:, :1], positions[:, 1:]
    wide = of_patches.to(torch.promote_types(positions.dtype, torch.float32))
    places = wide.mT.unflatten(-1, old_grid)
    if grid[1] == 1:  # PyTorch 2.13 resamples one column wrongly, and one row rightly: transpose
        places = F.interpolate(places.mT, size=(1, grid[0]), mode="bicubic", antialias=True).mT
    else:
        places = F.interpolate(places, size=grid, mode="bicubic", antialias=True)
    return torch.cat([of_class, places.flatten(2).mT.to(positions.dtype)], dim=1)
