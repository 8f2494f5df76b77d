"""Classes by a linear map of frozen features: multinomial logistic regression, solved to its optimum."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_mae.evaluation.scores import Scores, hits, score

PENALTIES = tuple(10.0**exponent for exponent in range(1, -6, -1))
"""The penalties that the probe tries, strongest first: the search for each starts at the solution of the one before."""

HELD_OUT = 5
"""One training image in `HELD_OUT` of each class is held out to choose the penalty."""

_GRADIENT, _MOST_STEPS = 1e-6, 1000
"""A solution is found when no entry of the gradient is larger than this, or after this many steps."""

_ROWS_AT_ONCE = 2**16


class Linear(NamedTuple):
    """weight [classes, width] and bias [classes]: scores are features @ weight.T + bias."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias


def linear_probe(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, *, seed: int = 0
) -> Scores:
    """A linear probe of frozen features: ``logistic_regression`` with the best of ``PENALTIES``.

    Features are standardised by the training images. A fifth of the training images of each class is held out to choose the
    penalty by: the one with the least cross entropy there, which so few images tell better than an accuracy. Weaker ones are not
    tried once two in a row were worse. With that penalty the probe learns from all training images; those to test on choose
    nothing.

    Args:
        features, test_features: [images, width], floating point; computed with in float64.
        labels, test_labels: int64 [images], counting from 0.
        seed: of the choice of those held out.

    Raises:
        ValueError: no class has two training images.
    """
    classes = 1 + int(max(labels.max(), test_labels.max()))
    features, test_features = features.double(), test_features.double()
    mean, deviation = features.mean(0), features.std(0)
    # A feature that is equal in all images teaches nothing; divided by its rounding error, it would count.
    deviation = torch.where(deviation > 1e-10 * mean.abs().clamp_min(1e-300), deviation, torch.inf)
    features, test_features = (features - mean) / deviation, (test_features - mean) / deviation
    held_out = one_of(HELD_OUT, labels, seed)
    if not held_out.any():
        raise ValueError("labels: expected a class with two training images at least, to choose the penalty by one")
    known = ~held_out
    tried, solution = [], None
    for penalty in PENALTIES:
        solution = logistic_regression(features[known], labels[known], classes, penalty, start=solution)
        loss = float(F.cross_entropy(solution(features[held_out]), labels[held_out]))
        top1 = hits(solution(test_features), test_labels, 1)
        tried.append({"penalty": penalty, "held_out_cross_entropy": loss, "top1": top1})
        if len(tried) > 2 and all(
            each["held_out_cross_entropy"] > tried[-3]["held_out_cross_entropy"] for each in tried[-2:]
        ):
            break
    penalty = min(tried, key=lambda each: each["held_out_cross_entropy"])["penalty"]
    solution = None
    for stronger in PENALTIES[: PENALTIES.index(penalty) + 1]:
        solution = logistic_regression(features, labels, classes, stronger, start=solution)
    assert solution is not None
    return score(solution(test_features), test_labels, chosen={"penalty": penalty}, tried=tried)


def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, penalty: float, *, start: Linear | None = None
) -> Linear:
    """The one minimum of mean cross entropy + penalty / 2 * ||weight||^2, where features are; the bias has no penalty.

    By PyTorch's L-BFGS with a line search for the strong Wolfe conditions, until no entry of the gradient is above 1e-6. It is
    scikit-learn's ``LogisticRegression(C=1 / (penalty * images))``.

    Args:
        features: float64 [images, width].
        labels: int64 [images], below ``classes``.
        penalty: above 0, so that there is one minimum.
        start: where the search begins; zeros if None.

    Warns:
        UserWarning: after 1,000 steps the gradient is larger still.
    """
    width = features.shape[1]
    joined = features.new_zeros(classes, width + 1)
    if start is not None:
        joined = torch.cat([start.weight, start.bias[:, None]], 1)
    joined = joined.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [joined],
        max_iter=_MOST_STEPS,
        max_eval=2 * _MOST_STEPS,
        history_size=20,
        tolerance_grad=_GRADIENT,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        search.zero_grad()
        total = penalty / 2 * joined[:, :width].square().sum()
        total.backward()
        for some, of_some in zip(features.split(_ROWS_AT_ONCE), labels.split(_ROWS_AT_ONCE), strict=True):
            scores = some @ joined[:, :width].T + joined[:, width]
            share = F.cross_entropy(scores, of_some, reduction="sum") / len(features)
            share.backward()
            total = total.detach() + share.detach()
        return total

    with torch.enable_grad():
        search.step(objective)
        objective()  # the last step may have been one of a line search
    assert joined.grad is not None
    if not (left := float(joined.grad.abs().max())) <= 10 * _GRADIENT:
        warnings.warn(
            f"the probe with penalty {penalty:g} is no minimum yet after {_MOST_STEPS} steps: gradient {left:.1e}",
            stacklevel=2,
        )
    weight, bias = joined.detach().split([width, 1], 1)
    return Linear(weight, bias[:, 0])


def one_of(parts: int, labels: Tensor, seed: int) -> Tensor:
    """bool [images]: one of so many images of each class, drawn with ``seed``, where a class has two or more."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels = labels.cpu()
    for label in labels.unique():
        of_class = order[labels[order] == label]
        chosen[of_class[: max(1, len(of_class) // parts) if len(of_class) > 1 else 0]] = True
    return chosen
