"""Pictures of what a model has learnt."""

from __future__ import annotations

from crate_mae.pictures.reconstructions import predicted_patches, reconstruction_sheet

__all__ = ["predicted_patches", "reconstruction_sheet"]
