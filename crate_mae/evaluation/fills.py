"""Guesses at removed patches that need no learning: what a model must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_mae.data.augmentation import gaussian

BLUR_SIGMAS = tuple(eighths / 8 for eighths in (2, 3, 4, 5, 6, 7, 8, 10, 12))
"""Widths of the Gaussian blurs that are tried, in sides of a patch; with three of four removed the best is about 5/8."""


def mean_visible_patch(target: Tensor, mask: Tensor) -> Tensor:
    """[batch, 1, values]: the mean of each image's visible patches, value by value; mask is 1 where removed."""
    visible = (1 - mask).unsqueeze(-1)
    return (target * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)


def mean_visible_colour(target: Tensor, mask: Tensor, *, channels: int) -> Tensor:
    """[batch, 1, values]: the mean colour of each image's visible patches, at every pixel of a patch."""
    patch = mean_visible_patch(target, mask).unflatten(-1, (-1, channels))
    return patch.mean(-2, keepdim=True).expand_as(patch).flatten(-2)


def blurred_visible(images: Tensor, visible: Tensor, sigma: float) -> Tensor:
    """Gaussian means of the visible pixels around every pixel, blur(images * visible) / blur(visible).

    Args:
        images: [batch, channels, height, width], floating point.
        visible: 1 where a pixel is visible and 0 where not, of a shape that expands to that of ``images``; a pixel at least.
        sigma: standard deviation of the Gaussian, in pixels.

    Returns:
        As ``images``. Where all that is visible is so far off that its weights vanish, the mean of the visible pixels.
    """
    if sigma <= 0:
        raise ValueError(f"sigma: expected a number of pixels above 0, got {sigma}")
    rows, columns = (gaussian(side, sigma, images) for side in images.shape[-2:])
    visible = visible.to(images.dtype)
    weights = rows @ visible @ columns
    means = (images * visible).sum((-2, -1), keepdim=True) / visible.sum((-2, -1), keepdim=True)
    # Off the mean and back onto it: so rounding of small weights, too, pulls towards the mean.
    around = rows @ ((images - means) * visible) @ columns
    return means + around / weights.clamp_min(torch.finfo(images.dtype).tiny)
