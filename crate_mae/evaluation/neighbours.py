"""Classification by nearest neighbours, which trains nothing: it finds only what the features hold."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_mae.evaluation.scores import Scores, hits, score

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.07, 0.2, 1.0)
"""Tried with each number of neighbours. Wu et al. (arXiv 1805.01978, section 3.4) and DINO take 0.07."""

_AT_ONCE = 2**24
"""Cosines in memory at once."""


def nearest_neighbours(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> Scores:
    """Weighted nearest neighbours, as in Wu et al. (arXiv 1805.01978, section 3.4) and DINO (arXiv 2104.14294, appendix F).

    Each of the k training images with the largest cosine c votes for its class, with the weight exp(c / T). The k and T are those
    of ``NEIGHBOURS`` and ``TEMPERATURES`` that classify most training images right, each by all the others; of equals, the
    largest k. A class without a vote is never among the top five.

    Args:
        features, test_features: [images, width], floating point.
        labels, test_labels: int64 [images], counting from 0.

    Raises:
        ValueError: there are fewer than two training images.
    """
    if len(features) < 2:
        raise ValueError(f"features: expected two training images or more, got {len(features)}")
    classes = 1 + int(max(labels.max(), test_labels.max()))
    features, test_features = F.normalize(features, dim=-1), F.normalize(test_features, dim=-1)
    # A training image is not its own neighbour, so that there is one fewer.
    counts = [count for count in NEIGHBOURS if count < len(features)]
    own = _nearest(features, features, counts[-1], themselves=True)
    nearest = _nearest(test_features, features, counts[-1])
    tried = []
    for count, temperature in itertools.product(counts, TEMPERATURES):
        left_out = hits(_votes(*own, labels, classes, count, temperature), labels, 1)
        top1 = hits(_votes(*nearest, labels, classes, count, temperature), test_labels, 1)
        tried.append({"neighbours": count, "temperature": temperature, "leave_one_out": left_out, "top1": top1})
    best = max(tried, key=lambda each: (each["leave_one_out"], each["neighbours"], each["temperature"]))
    count, temperature = int(best["neighbours"]), best["temperature"]
    votes = _votes(*nearest, labels, classes, count, temperature)
    return score(votes, test_labels, chosen={"neighbours": count, "temperature": temperature}, tried=tried)


def _nearest(queries: Tensor, features: Tensor, count: int, *, themselves: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and indices [queries, count] of the nearest, nearest first; with ``themselves`` no image is its own neighbour."""
    found: list[tuple[Tensor, Tensor]] = []
    rows = max(1, _AT_ONCE // len(features))
    for start in range(0, len(queries), rows):
        cosines = queries[start : start + rows] @ features.T
        if themselves:
            cosines.diagonal(start).fill_(-torch.inf)
        found.append(cosines.topk(count, dim=-1))
    return torch.cat([cosines for cosines, _ in found]), torch.cat([numbers for _, numbers in found])


def _votes(cosines: Tensor, numbers: Tensor, labels: Tensor, classes: int, count: int, temperature: float) -> Tensor:
    """[queries, classes]: the sums of the votes of the first ``count`` neighbours, -inf where there is none."""
    # Relative to the nearest, whose vote is 1: nothing overflows, and the order of the classes is the same.
    weights = ((cosines[:, :count] - cosines[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(cosines), classes).scatter_add_(1, labels[numbers[:, :count]], weights)
    return votes.masked_fill(votes == 0, -torch.inf)
