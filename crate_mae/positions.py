"""Fixed two-dimensional sine-cosine positions for any grid of patches."""

from __future__ import annotations

import torch
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
