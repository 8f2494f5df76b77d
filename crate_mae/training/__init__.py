"""Pre-training of CRATE-MAE by masked reconstruction."""

from __future__ import annotations

from crate_mae.training.callbacks import Callback
from crate_mae.training.config import (
    ImagesConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    demo_config,
)
from crate_mae.training.interrupts import RunStopped
from crate_mae.training.loop import PretrainResult, plan, pretrain
from crate_mae.training.metrics import NonFiniteLoss
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.planning import Plan
from crate_mae.training.ranks import LostRank
from crate_mae.training.recipes import recipe
from crate_mae.training.schedule import warmup_cosine
from crate_mae.training.unreadable import TooManyUnreadable
from crate_mae.training.validation import Validation, ValidationErrors

__all__ = [
    "Callback",
    "ImagesConfig",
    "LostRank",
    "NonFiniteLoss",
    "OptimizerConfig",
    "Plan",
    "PretrainConfig",
    "PretrainResult",
    "RunConfig",
    "RunStopped",
    "ScheduleConfig",
    "TooManyUnreadable",
    "Validation",
    "ValidationErrors",
    "build_optimizer",
    "demo_config",
    "plan",
    "pretrain",
    "recipe",
    "warmup_cosine",
]
