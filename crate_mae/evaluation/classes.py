"""How well frozen features tell classes apart, by cross-validation: of sets that come in one part."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from crate_mae.evaluation.neighbours import nearest_neighbours
from crate_mae.evaluation.probe import linear_probe
from crate_mae.evaluation.scores import Scores

METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Scores]] = {
    "knn": nearest_neighbours,
    "linear": linear_probe,
}
"""Ways to classify frozen features: functions of (features, labels, test_features, test_labels)."""

TITLES = {"knn": "k nearest neighbours", "linear": "linear probe", "finetune": "fine-tuned"}


class ClassAccuracies(NamedTuple):
    """Fractions of images whose class is found."""

    knn: float
    linear: float


def class_accuracies(features: Tensor, labels: Tensor, *, folds: int = 5, seed: int = 0) -> ClassAccuracies:
    """Cross-validated accuracies: every image is classified once, by the labels of those in the other folds.

    Args:
        features: [images, width], such as ``pooled_features``.
        labels: [images], int64, counting from 0.
        folds: parts, each with its share of every class; at most the images of the smallest class, and at least 2.
        seed: of the assignment to folds.

    Raises:
        ValueError: folds is out of range.
    """
    smallest = int(labels.bincount().min())
    if not 2 <= folds <= smallest:
        raise ValueError(f"folds: expected 2 to {smallest}, the images of the smallest class, got {folds}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    fold = torch.empty_like(labels)
    for label in range(int(labels.max()) + 1):
        of_class = order[labels[order] == label]
        fold[of_class] = torch.arange(len(of_class)) % folds
    found = dict.fromkeys(METHODS, 0.0)
    for held_out in (fold == number for number in range(folds)):
        parts = features[~held_out], labels[~held_out], features[held_out], labels[held_out]
        for name, method in METHODS.items():
            found[name] += method(*parts).top1 * int(held_out.sum())
    return ClassAccuracies(**{name: count / len(labels) for name, count in found.items()})
