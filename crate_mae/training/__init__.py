"""Pre-training of CRATE-MAE by masked reconstruction."""

from __future__ import annotations

from crate_mae.training.config import (
    ImagesConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    demo_config,
)
from crate_mae.training.interrupts import RunStopped
from crate_mae.training.loop import PretrainResult, pretrain
from crate_mae.training.metrics import NonFiniteLoss
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.ranks import LostRank
from crate_mae.training.schedule import warmup_cosine
from crate_mae.training.unreadable import TooManyUnreadable
from crate_mae.training.validation import Validation, ValidationErrors

__all__ = [
    "ImagesConfig",
    "LostRank",
    "NonFiniteLoss",
    "OptimizerConfig",
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
    "pretrain",
    "warmup_cosine",
]
