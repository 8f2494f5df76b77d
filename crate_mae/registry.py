"""The published sizes of CRATE-MAE."""

from __future__ import annotations

import dataclasses
from typing import Any

from crate_mae.config import ModelConfig
from crate_mae.model import CrateMAE


def _published(embed_dim: int, num_heads: int, depth: int) -> ModelConfig:
    return ModelConfig(
        embed_dim=embed_dim, depth=depth, num_heads=num_heads, decoder_depth=depth, decoder_num_heads=num_heads
    )


MODELS: dict[str, ModelConfig] = {
    "crate_mae_tiny": _published(384, 6, 12),
    "crate_mae_small": _published(576, 12, 12),
    "crate_mae_base": _published(768, 12, 12),
    "crate_mae_large": _published(1024, 16, 24),
}


def create_model(name: str, **overrides: Any) -> CrateMAE:
    """A freshly initialised CRATE-MAE of a published size.

    Args:
        name: "crate_mae_tiny", "crate_mae_small", "crate_mae_base" or "crate_mae_large".
        **overrides: fields of ``ModelConfig`` that shall differ, such as ``img_size``, ``patch_size`` or ``lambd``.

    Raises:
        ValueError: the name is unknown or an override out of range.
        TypeError: an override is no field of ``ModelConfig``, or not of its type.
    """
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}")
    unknown = overrides.keys() - {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: no such field of ModelConfig")
    return CrateMAE(dataclasses.replace(MODELS[name], **overrides))


def count_parameters(model: CrateMAE) -> tuple[int, int]:
    """(trained, official): what receives a gradient, and what the official code and the papers count.

    The official count adds two frozen position tables and a ``decoder_embed`` projection that nothing uses.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    width = model.config.embed_dim
    return trained, trained + 2 * model.decoder_pos_embed.numel() + width * width + width
