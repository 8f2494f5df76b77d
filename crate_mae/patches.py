"""Images to patches and back, and which patches are removed."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from crate_mae.config import grid_of


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[batch, channels, height, width] -> [batch, patches, patch_size**2 * channels], row by row, channels fastest."""
    rows, columns = grid_of(tuple(images.shape[-2:]), patch_size)
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", h=rows, w=columns)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of ``patchify`` for patches that form a ``grid`` of (rows, columns)."""
    rows, columns = grid
    if patches.shape[1] != rows * columns:
        raise ValueError(f"patches: expected {rows} x {columns} = {rows * columns} of them, got {patches.shape[1]}")
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=patch_size, q=patch_size)


def removed_patches(noise: Tensor, mask_ratio: float) -> Tensor:
    """Mask [batch, patches], float32, 1 where a patch is removed: those with the largest noise in each sample.

    int(patches * (1 - mask_ratio)) patches are kept, as in MAE.
    """
    keep = int(noise.shape[1] * (1 - mask_ratio))
    kept = noise.argsort(dim=1)[:, :keep]
    return torch.ones_like(noise, dtype=torch.float32).scatter_(1, kept, 0.0)
