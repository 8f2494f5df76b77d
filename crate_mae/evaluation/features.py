"""What the encoder makes of whole images: one vector an image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from crate_mae.data import ImageLoader, Normalization, in_order
from crate_mae.model import CrateMAE


@torch.no_grad()
def pooled_features(
    model: CrateMAE, images: Dataset[Tensor], normalization: Normalization, *, batch_size: int = 50
) -> Tensor:
    """The mean of an image's patch tokens after the encoder, no patch removed: float32 [images, width], on the CPU.

    Args:
        images: items uint8 [channels, height, width], as ``CentreCropped`` has them.
    """
    batches = standardised(model, images, normalization, batch_size)
    return torch.cat([model.encode(batch)[:, 1:].mean(1).float().cpu() for batch in batches])


def standardised(
    model: nn.Module, images: Dataset[Tensor], normalization: Normalization, batch_size: int
) -> Iterator[Tensor]:
    """Batches of the images as the model takes them, in their order, where the model is."""
    device = next(model.parameters()).device
    for pixels in ImageLoader(images, in_order(len(images), batch_size)):
        yield normalization(pixels.to(device))
