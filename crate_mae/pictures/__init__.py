"""Pictures of what a model has learnt."""

from __future__ import annotations

from crate_mae.pictures.layers import layers_picture
from crate_mae.pictures.reconstructions import (
    Reconstructions,
    predicted_patches,
    reconstruct,
    reconstruction_sheet,
)
from crate_mae.pictures.summary import Classes, Curves, Sparsity, summary_picture

__all__ = [
    "Classes",
    "Curves",
    "Reconstructions",
    "Sparsity",
    "layers_picture",
    "predicted_patches",
    "reconstruct",
    "reconstruction_sheet",
    "summary_picture",
]
