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


def unpatchify(patches: Tensor, patch_size: int, channels: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of ``patchify`` for patches that form a ``grid`` of (rows, columns).

    Raises:
        ValueError: the patches are not [batch, rows * columns, patch_size**2 * channels].
    """
    rows, columns = grid
    width = patch_size**2 * channels
    if patches.ndim != 3 or patches.shape[-1] != width:
        raise ValueError(
            f"patches: expected [batch, patches, {patch_size} * {patch_size} * {channels} channels = {width}], "
            f"got shape {tuple(patches.shape)}"
        )
    if patches.shape[1] != rows * columns:
        raise ValueError(
            f"patches: expected {rows} x {columns} = {rows * columns} of them, got {patches.shape[1]}; "
            f"for images of another size, give grid=(rows, columns)"
        )
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=patch_size, q=patch_size)


def kept_patches(noise: Tensor, mask_ratio: float) -> Tensor:
    """Numbers [batch, kept] of the patches that are not removed: those with the least noise [batch, patches] in each sample.

    int(patches * (1 - mask_ratio)) of them, as in MAE.
    """
    return noise.argsort(dim=1)[:, : int(noise.shape[1] * (1 - mask_ratio))]


def removed_patches(kept: Tensor, patches: int) -> Tensor:
    """Mask [batch, patches], float32, 1 where a patch is removed."""
    return torch.ones(kept.shape[0], patches, device=kept.device).scatter(1, kept, 0.0)
