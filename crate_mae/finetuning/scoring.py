"""How well a classifier predicts the classes of images held out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from crate_mae.classifiers import Classifier
from crate_mae.data import LabelledCentreCropped, Normalization
from crate_mae.training.divergence import DivergenceWatch, Measured
from crate_mae.training.held_out import HeldOut
from crate_mae.training.precision import autocast


class Scores(NamedTuple):
    """Scores over all images to validate on; of each image, its largest centred part is seen.

    Attributes:
        val_loss: mean cross-entropy, in nats.
        val_top1, val_top5: fractions of images whose class has the largest logit, or one of the five largest.
        guess_loss: cross-entropy of predicting the frequencies of the classes for every image.
    """

    val_loss: float
    val_top1: float
    val_top5: float
    guess_loss: float

    @property
    def guess(self) -> tuple[str, float]:
        """The name and the error of the guess with which `DivergenceWatch` compares."""
        return "guessing", self.guess_loss


class Scoring(HeldOut[Classifier, Scores]):
    """Measures a classifier on the same images each time; in evaluation mode, without augmentation.

    Args:
        images: with their classes; where an image cannot be read, another stands in, with its own class.
        **measuring: as of `HeldOut`.
    """

    def __init__(self, images: LabelledCentreCropped, normalization: Normalization, **measuring: Any) -> None:
        super().__init__(images, len(images), normalization, **measuring)
        self.images = images
        shares = np.unique(images.labels, return_counts=True)[1] / len(images)
        self._guess_loss = float(-(shares * np.log(shares)).sum())

    @torch.no_grad()
    def unless(self, model: Classifier, stopped: Callable[[], object]) -> Scores | None:
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        try:
            for (pixels, labels), size in zip(self._loader, self._sizes, strict=True):
                if stopped():
                    return None
                labels = labels.to(device)
                with autocast(self.precision, device):
                    logits = model(self.normalization(pixels.to(device)))
                if self.ranks.rank < size:  # else this rank has no image of this batch
                    sums += _sums(logits.float(), labels)
        finally:
            model.train(was_training)
        of_ranks = self.ranks.gathered(sums.tolist())
        loss, top1, top5 = (math.fsum(each) / len(self.images) for each in zip(*of_ranks, strict=True))
        return Scores(loss, top1, top5, self._guess_loss)


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over a batch: cross-entropy, and how many classes have the largest logit, or one of the five largest."""
    hit = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss.double(), hit[:, 0].sum().double(), hit.sum().double()])


@dataclass
class ScoreWatch(DivergenceWatch):
    """A watch for which the best validation is the one with the highest top-1; among equals, the one with the least loss.

    Attributes:
        best_top1, best_top5: of the best validation.
    """

    best_top1: float | None = None
    best_top5: float | None = None

    @property
    def best(self) -> Scores | None:
        """The scores of the best validation."""
        loss, top1, top5, guess = self.best_val_loss, self.best_top1, self.best_top5, self.fill
        if loss is None or top1 is None or top5 is None or guess is None:
            return None
        return Scores(loss, top1, top5, guess)

    def validated(self, step: int, errors: Measured) -> bool:
        is_best = super().validated(step, errors)
        if is_best:
            assert isinstance(errors, Scores)
            self.best_top1, self.best_top5 = errors.val_top1, errors.val_top5
        return is_best

    def is_better(self, errors: Measured) -> bool:
        assert isinstance(errors, Scores)
        if self.best_val_loss is None or self.best_top1 is None:
            return True
        return (errors.val_top1, -errors.val_loss) > (self.best_top1, -self.best_val_loss)

    def forget_best(self) -> None:
        super().forget_best()
        self.best_top1 = self.best_top5 = None
