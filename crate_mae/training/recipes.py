"""Published recipes of pre-training, as settings."""

from __future__ import annotations

from typing import Any

from crate_mae.config import ModelConfig
from crate_mae.training.config import ImagesConfig, OptimizerConfig, ScheduleConfig

_MAE: dict[str, dict[str, Any]] = {
    "model": {"norm_pix_loss": True},
    "images": {"crop_scale": (0.2, 1.0), "flip": True, "blur": 0.0, "solarize": 0.0},
    "optimizer": {"base_lr": 1.5e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "clip_grad": 0.0},
    "schedule": {"batch_size": 4096, "epochs": 800, "warmup_epochs": 40.0, "min_lr": 0.0, "mask_ratio": 0.75},
}
"""MAE: arXiv 2111.06377, appendix A.1, table 8, and the commands of facebookresearch/mae, PRETRAIN.md."""

_CRATE_MAE: dict[str, dict[str, Any]] = {
    "model": {"norm_pix_loss": False},
    "images": {"crop_scale": (0.2, 1.0), "flip": True, "blur": 0.1, "solarize": 0.2},
    "optimizer": {"base_lr": 3e-5, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip_grad": 0.0},
    "schedule": {"batch_size": 4096, "epochs": 800, "warmup_epochs": 40.0, "min_lr": 0.0, "mask_ratio": 0.75},
}
"""CRATE-MAE: arXiv 2404.02446. The paper names flips, blur and solarisation without their fractions; these are those of BYOL's
second view (arXiv 2006.07733, table 6). Crops, betas, clipping and norm_pix_loss, which it does not mention, are the defaults of
MAE's code, on which the official code is built."""

RECIPES: dict[str, dict[str, dict[str, Any]]] = {"mae": _MAE, "crate-mae-paper": _CRATE_MAE}
"""The settings of each recipe, by section."""

_SECTIONS = {"model": ModelConfig, "images": ImagesConfig, "optimizer": OptimizerConfig, "schedule": ScheduleConfig}


def recipe(name: str) -> dict[str, Any]:
    """The sections of a published recipe, for `PretrainConfig(out=..., data=..., **recipe("mae"))`.

    The model has the default size; change what a recipe leaves open with `dataclasses.replace`.

    Args:
        name: one of `RECIPES`: "mae" (arXiv 2111.06377), "crate-mae-paper" (arXiv 2404.02446).

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return {section: _SECTIONS[section](**settings) for section, settings in RECIPES[name].items()}
