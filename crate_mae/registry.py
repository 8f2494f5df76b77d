"""The published sizes of CRATE-MAE, CRATE and CRATE-alpha."""

from __future__ import annotations

import dataclasses
from typing import Any

from crate_mae.classifiers import Classifier, model_of
from crate_mae.config import ClassifierConfig, ModelConfig
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
"""Sizes of CRATE-MAE, for pre-training."""

CLASSIFIERS: dict[str, ClassifierConfig] = {
    "crate_tiny": ClassifierConfig(embed_dim=384, num_heads=6),
    "crate_small": ClassifierConfig(embed_dim=576, num_heads=12),
    "crate_base": ClassifierConfig(),
    "crate_large": ClassifierConfig(embed_dim=1024, num_heads=16, depth=24),
    "crate_alpha_base": ClassifierConfig("crate_alpha"),
    "crate_alpha_large": ClassifierConfig("crate_alpha", patch_size=14, embed_dim=1024, num_heads=16, depth=24),
}
"""Sizes of the supervised models, CRATE and CRATE-alpha."""


def create_model(name: str, **overrides: Any) -> CrateMAE | Classifier:
    """A freshly initialised model of a published size.

    Args:
        name: one of ``MODELS``, for a CrateMAE, or of ``CLASSIFIERS``, for a Classifier.
        **overrides: fields of ``ModelConfig`` or ``ClassifierConfig`` with other values, such as ``img_size``, ``patch_size``,
            ``lambd`` or ``num_classes``.

    Raises:
        ValueError: the name is unknown or an override out of range.
        TypeError: an override is no field of the configuration, or not of its type.
    """
    return model_of(published(name, **overrides))


def published(name: str, **overrides: Any) -> ModelConfig | ClassifierConfig:
    """The configuration of ``create_model(name, **overrides)``; errors as there."""
    known: dict[str, ModelConfig | ClassifierConfig] = {**MODELS, **CLASSIFIERS}
    if name not in known:
        raise ValueError(f"name: expected one of {', '.join(known)}, got {name!r}")
    config = known[name]
    unknown = overrides.keys() - {field.name for field in dataclasses.fields(config)}
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: no such field of {type(config).__name__}")
    return dataclasses.replace(config, **overrides)


def count_parameters(model: CrateMAE | Classifier) -> tuple[int, int]:
    """(trained, official): parameters that receive a gradient, and those that the official code and the papers count.

    The official count of CRATE-MAE adds two frozen position tables and a ``decoder_embed`` projection that nothing uses.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if isinstance(model, Classifier):
        return trained, sum(parameter.numel() for parameter in model.parameters())
    width = model.config.embed_dim
    return trained, trained + 2 * model.decoder_pos_embed.numel() + width * width + width
