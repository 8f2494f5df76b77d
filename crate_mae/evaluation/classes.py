"""How well frozen features tell classes apart: nearest neighbours, and a linear probe."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE_PENALTIES = tuple(10.0**exponent for exponent in range(-3, 5))
"""Tried by the linear probe, on features of unit variance."""


class ClassAccuracies(NamedTuple):
    """Fractions of images whose class is found."""

    knn: float
    linear_probe: float


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
    found = [0.0, 0.0]
    for held_out in (fold == number for number in range(folds)):
        parts = features[~held_out], labels[~held_out], features[held_out], labels[held_out]
        for place, accuracy in enumerate((knn_accuracy, linear_probe_accuracy)):
            found[place] += accuracy(*parts) * int(held_out.sum())
    return ClassAccuracies(*(count / len(labels) for count in found))


def knn_accuracy(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, *, neighbours: int = 10
) -> float:
    """The fraction of test images in whose class most of the nearest training images are.

    Near means a large cosine, by which votes are weighed.

    Args:
        features, test_features: [images, width], floating point.
        labels, test_labels: [images], int64, counting from 0.
        neighbours: how many training images vote; all, where there are fewer.
    """
    cosines = F.normalize(test_features, dim=-1) @ F.normalize(features, dim=-1).T
    nearest = cosines.topk(min(neighbours, len(features)), dim=-1)
    ballots = F.one_hot(labels[nearest.indices], int(labels.max()) + 1).to(features.dtype)
    votes = (ballots * nearest.values.unsqueeze(-1)).sum(1)
    return _accuracy(votes, test_labels)


def linear_probe_accuracy(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """The fraction of test images whose class has the largest score of a ridge regression onto the classes.

    Features are standardised by the training images. The penalty is that of ``RIDGE_PENALTIES`` with the least
    leave-one-out error on the training images, which a ridge regression has in closed form: with the fit H Y, left-out residuals
    are (Y - H Y) / (1 - diag H). Arguments as of ``knn_accuracy``.
    """
    features, test_features = features.double(), test_features.double()
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-12)
    features, test_features = (features - mean) / deviation, (test_features - mean) / deviation
    targets = F.one_hot(labels).double()
    offset = targets.mean(0)
    left, singular, right = torch.linalg.svd(features, full_matrices=False)
    projected = left.T @ (targets - offset)

    def left_out_error(penalty: float) -> float:
        kept = singular**2 / (singular**2 + penalty)
        residual = targets - offset - left @ (kept[:, None] * projected)
        leverage = (left**2 * kept).sum(1) + 1 / len(features)  # the offset's part included
        return float((residual / (1 - leverage)[:, None]).square().mean())

    penalty = min(RIDGE_PENALTIES, key=left_out_error)
    weights = right.T @ ((singular / (singular**2 + penalty))[:, None] * projected)
    return _accuracy(test_features @ weights + offset, test_labels)


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).double().mean())
