"""What a model has learnt, compared with what needs no learning: fills of removed patches, and classes of photographs."""

from __future__ import annotations

from crate_mae.evaluation.classes import METHODS, ClassAccuracies, class_accuracies
from crate_mae.evaluation.features import FeatureSpec, features_of, pooled_features
from crate_mae.evaluation.fills import BLUR_SIGMAS, blurred_visible, mean_visible_colour, mean_visible_patch
from crate_mae.evaluation.neighbours import nearest_neighbours
from crate_mae.evaluation.probe import linear_probe, logistic_regression
from crate_mae.evaluation.scores import Scores

__all__ = [
    "BLUR_SIGMAS",
    "METHODS",
    "ClassAccuracies",
    "FeatureSpec",
    "Scores",
    "blurred_visible",
    "class_accuracies",
    "features_of",
    "linear_probe",
    "logistic_regression",
    "mean_visible_colour",
    "mean_visible_patch",
    "nearest_neighbours",
    "pooled_features",
]
