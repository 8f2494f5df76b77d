"""A masked autoencoder's reconstructions: original, masked, prediction, prediction around the visible patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from crate_mae.data import Normalization
from crate_mae.model import CrateMAE

COLUMNS = ("original", "masked", "prediction", "prediction + visible")

_REMOVED = 128
_GAP = 4
_TITLE_HEIGHT = 18
_READABLE_SIDE = 128


def predicted_patches(model: CrateMAE, images: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
    """The prediction in normalised pixels, float32 [batch, patches, patch values].

    A model with `norm_pix_loss` predicts every patch up to its mean and standard deviation; these are then taken from
    the true patch, so that the result shows the structure predicted, with brightness and contrast given.
    """
    pred = pred.float()
    if not model.config.norm_pix_loss:
        return pred
    target = model.patchify(images.float())
    return pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)


class Reconstructions(NamedTuple):
    """uint8 [batch, channels, height, width]: images, what of them is visible, the prediction, and it around what is visible.

    `removed` [batch, channels, height, width] is True for the pixels of removed patches. All are on the CPU.
    """

    original: torch.Tensor
    masked: torch.Tensor
    prediction: torch.Tensor
    pasted: torch.Tensor
    removed: torch.Tensor


@torch.no_grad()
def reconstruct(
    model: CrateMAE,
    pixels: torch.Tensor,
    normalization: Normalization,
    *,
    mask_ratio: float = 0.75,
    noise: torch.Tensor | None = None,
) -> Reconstructions:
    """The model's reconstructions of images.

    Args:
        pixels: uint8 [batch, channels, height, width], on any device.
        noise: [batch, patches], fixes the masks as in `model(images, mask_ratio, noise)`.

    Raises:
        ValueError: the prediction is not finite, which would be drawn black.
    """
    device = next(model.parameters()).device
    images = normalization(pixels.to(device))
    was_training = model.training
    model.eval()
    output = model(images, mask_ratio=mask_ratio, noise=None if noise is None else noise.to(device))
    model.train(was_training)
    if not output.pred.isfinite().all():
        raise ValueError("model: expected a finite prediction, got NaN or infinite values")

    side = model.config.patch_size
    grid = (images.shape[-2] // side, images.shape[-1] // side)

    def to_pixels(patches: torch.Tensor) -> torch.Tensor:
        return normalization.inverse(model.unpatchify(patches, grid=grid)).cpu()

    target = model.patchify(images)
    prediction = predicted_patches(model, images, output.pred)
    removed = output.mask.unsqueeze(-1).bool()
    pasted = to_pixels(torch.where(removed, prediction, target))
    removed_pixels = model.unpatchify(removed.expand_as(target).to(target.dtype), grid=grid).bool().cpu()
    original = pixels.cpu()
    masked = original.masked_fill(removed_pixels, _REMOVED)
    return Reconstructions(original, masked, to_pixels(prediction), pasted, removed_pixels)


def reconstruction_sheet(
    model: CrateMAE,
    pixels: torch.Tensor,
    normalization: Normalization,
    *,
    mask_ratio: float = 0.75,
    noise: torch.Tensor | None = None,
) -> Image.Image:
    """A titled picture with a row for each image and the columns of `COLUMNS`; arguments as of `reconstruct`."""
    shown = reconstruct(model, pixels, normalization, mask_ratio=mask_ratio, noise=noise)
    return _sheet([shown.original, shown.masked, shown.prediction, shown.pasted], COLUMNS)


def _sheet(columns: Sequence[torch.Tensor], titles: Sequence[str]) -> Image.Image:
    rows, _, height, width = columns[0].shape
    zoom = max(1, -(-_READABLE_SIDE // min(height, width)))
    cell_height, cell_width = height * zoom, width * zoom
    sheet = Image.new(
        "RGB",
        (
            _GAP + len(columns) * (cell_width + _GAP),
            _TITLE_HEIGHT + rows * (cell_height + _GAP),
        ),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, (images, title) in enumerate(zip(columns, titles, strict=True)):
        left = _GAP + column * (cell_width + _GAP)
        draw.text((left + cell_width / 2, _TITLE_HEIGHT / 2), title, fill="black", font=font, anchor="mm")
        for row, image in enumerate(images):
            # Nearest neighbour keeps the edges of patches sharp.
            cell = to_image(image).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(cell, (left, _TITLE_HEIGHT + row * (cell_height + _GAP)))
    return sheet


def to_image(pixels: torch.Tensor) -> Image.Image:
    """An RGB image of uint8 [channels, height, width]; channels other than three are shown grey, as their mean."""
    if pixels.shape[0] != 3:
        pixels = pixels.float().mean(0, keepdim=True).round().to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
