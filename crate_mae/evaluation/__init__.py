"""What a model has learnt, beside what needs no learning: fills of removed patches, and classes of photographs."""

from __future__ import annotations

from crate_mae.evaluation.classes import ClassAccuracies, class_accuracies, knn_accuracy, linear_probe_accuracy
from crate_mae.evaluation.features import pooled_features
from crate_mae.evaluation.fills import BLUR_SIGMAS, blurred_visible, mean_visible_colour, mean_visible_patch

__all__ = [
    "BLUR_SIGMAS",
    "ClassAccuracies",
    "blurred_visible",
    "class_accuracies",
    "knn_accuracy",
    "linear_probe_accuracy",
    "mean_visible_colour",
    "mean_visible_patch",
    "pooled_features",
]
