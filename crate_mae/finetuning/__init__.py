"""Fine-tuning: classifiers trained end to end, on the machinery of pre-training."""

from __future__ import annotations

from crate_mae.finetuning.config import (
    AugmentConfig,
    FinetuneConfig,
    FinetuneOptimizerConfig,
    FinetuneRunConfig,
    FinetuneScheduleConfig,
)
from crate_mae.finetuning.loop import FinetuneResult, finetune, plan
from crate_mae.finetuning.mixing import Mix, draw_mix, mixed, mixed_targets
from crate_mae.finetuning.optimizer import build_layerwise_optimizer, layer_of, lr_scale
from crate_mae.finetuning.scoring import Scores, Scoring
from crate_mae.finetuning.starting import starting_classifier

__all__ = [
    "AugmentConfig",
    "FinetuneConfig",
    "FinetuneOptimizerConfig",
    "FinetuneResult",
    "FinetuneRunConfig",
    "FinetuneScheduleConfig",
    "Mix",
    "Scores",
    "Scoring",
    "build_layerwise_optimizer",
    "draw_mix",
    "finetune",
    "layer_of",
    "lr_scale",
    "mixed",
    "mixed_targets",
    "plan",
    "starting_classifier",
]
