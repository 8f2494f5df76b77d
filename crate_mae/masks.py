"""Which patches a masked autoencoder removes."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_patches(noise: Tensor, mask_ratio: float) -> Tensor:
    """Numbers [batch, kept] of the patches that stay: in each sample those with the least noise [batch, patches].

    int(patches * (1 - mask_ratio)) patches of a sample stay, as in MAE (arXiv 2111.06377).
    """
    return noise.argsort(dim=1)[:, : int(noise.shape[1] * (1 - mask_ratio))]


def removed_patches(kept: Tensor, patches: int) -> Tensor:
    """Mask [batch, patches], float32, 1 where a patch is removed; ``kept`` is what ``kept_patches`` returns."""
    return torch.ones(kept.shape[0], patches, device=kept.device).scatter(1, kept, 0.0)
