"""Images to patches and back."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from crate_mae.config import grid_of


def patch_grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches in images [..., height, width].

    Raises:
        ValueError: height or width is not a positive multiple of the patch.
    """
    height, width = images.shape[-2:]
    return grid_of((height, width), patch_size)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[batch, channels, height, width] -> [batch, patches, patch_size**2 * channels], row by row, channels fastest."""
    rows, columns = patch_grid(images, patch_size)
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
