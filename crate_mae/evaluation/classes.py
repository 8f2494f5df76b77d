"""How well frozen features tell classes apart: nearest neighbours, and a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from crate_mae.data import Normalization
from crate_mae.evaluation.features import pooled_features
from crate_mae.model import CrateMAE

RIDGE_PENALTIES = tuple(10.0**exponent for exponent in range(-3, 5))
"""Tried by the linear probe, on features of unit variance."""


class ClassAccuracies(NamedTuple):
    """Fractions of images whose class is found."""

    knn: float
    linear_probe: float


def class_accuracies(
    model: CrateMAE,
    train: tuple[Dataset[Tensor], Sequence[int]],
    test: tuple[Dataset[Tensor], Sequence[int]],
    normalization: Normalization,
) -> ClassAccuracies:
    """Classify the test images by the mean of their patch tokens after the encoder.

    Args:
        train, test: images, as ``pooled_features`` takes them, and their labels, which count from 0.
    """
    parts = []
    for images, labels in (train, test):
        parts += [pooled_features(model, images, normalization), torch.tensor(labels)]
    return ClassAccuracies(knn_accuracy(*parts), linear_probe_accuracy(*parts))


def knn_accuracy(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, *, neighbours: int = 10
) -> float:
    """The fraction of test images in whose class most of the nearest training images are.

    Near means a large cosine of features less the training mean, by which votes are weighed.

    Args:
        features, test_features: [images, width], floating point.
        labels, test_labels: [images], int64, counting from 0.
        neighbours: how many training images vote; all, where there are fewer.
    """
    mean = features.mean(0)
    cosines = F.normalize(test_features - mean, dim=-1) @ F.normalize(features - mean, dim=-1).T
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
