"""Augmentation of whole batches on the training device: flips, blur, solarisation."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_mae.data.samples import Sample


def augmented(batch: Sample, device: torch.device) -> Tensor:
    """The augmented pixels of a batch, uint8 [batch, channels, height, width], on the device.

    In this order, as in DINO and DeiT III: mirrored, blurred, solarised (values of 128 and more are inverted).

    Args:
        batch: on the CPU; pinned memory is copied asynchronously.
    """
    pixels, flip = (each.to(device, non_blocking=True) for each in (batch.pixels, batch.flip))
    pixels = pixels.permute(0, 3, 1, 2)
    pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
    if len(which := batch.blur.nonzero().flatten()):
        sigma = batch.blur[which].to(device)
        which = which.to(device)
        pixels = pixels.index_copy(0, which, blurred(pixels[which], sigma))
    if batch.solarize.any():
        solarize = batch.solarize.to(device, non_blocking=True).view(-1, 1, 1, 1)
        pixels = torch.where(solarize & (pixels >= 128), 255 - pixels, pixels)
    return pixels


def blurred(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blurs, each image with its own width; at the edges only pixels inside the image count.

    Args:
        pixels: uint8 [batch, channels, height, width].
        sigma: [batch], standard deviations in pixels, above 0.
    """
    sigma = sigma.float().view(-1, 1, 1, 1)
    rows, columns = (gaussian(side, sigma, like=sigma) for side in pixels.shape[-2:])
    smooth = rows / rows.sum(-1, keepdim=True) @ pixels.float() @ (columns / columns.sum(-2, keepdim=True))
    return smooth.round().to(torch.uint8)


def gaussian(side: int, sigma: Tensor | float, like: Tensor) -> Tensor:
    """[..., side, side]: exp(-distance^2 / (2 sigma^2)) for every pair of pixels on a line.

    Args:
        sigma: in pixels; a number, or a tensor [..., 1, 1].
        like: of the dtype and on the device of the result.
    """
    place = torch.arange(side, device=like.device, dtype=like.dtype)
    return (-((place[:, None] - place) ** 2) / (2 * sigma**2)).exp()
