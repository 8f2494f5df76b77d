"""How often the right class is found: top-1, top-5, class by class, and what is taken for what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """The accuracy of a method on the test images.

    Attributes:
        top1: the fraction of images whose class has the highest score.
        top5: the fraction whose class is among the five highest; None where there are no more than five classes.
        confusion: int64 [classes, classes], how many images of the class of the row are taken for that of the column.
        chosen: the method's settings, found on the training images alone.
        tried: all settings that were tried: for each, what it was chosen by, and its top-1 on the test images, which chose
            nothing.
    """

    top1: float
    top5: float | None
    confusion: Tensor
    chosen: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)

    @property
    def of_classes(self) -> list[float | None]:
        """The accuracy in each class; None for a class without test images."""
        return [found / count if count else None for found, count in self._found_and_counts()]

    @property
    def class_mean(self) -> float:
        """The mean of ``of_classes``, in which every class counts alike, as the papers report it of Flowers and Pets."""
        there = [share for share in self.of_classes if share is not None]
        return sum(there) / len(there)

    def to_dict(self, classes: list[str]) -> dict[str, Any]:
        """Plain values, for JSON."""
        of_classes = [
            {"class": name, "images": count, "top1": found / count if count else None}
            for name, (found, count) in zip(classes, self._found_and_counts(), strict=True)
        ]
        return {
            "top1": self.top1,
            "top5": self.top5,
            "class_mean": self.class_mean,
            "chosen": self.chosen,
            "tried": self.tried,
            "classes": of_classes,
            "confusion": self.confusion.tolist(),
        }

    def _found_and_counts(self) -> list[tuple[int, int]]:
        return list(zip(self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True))


def score(scores: Tensor, labels: Tensor, **settings: Any) -> Scores:
    """Scores [images, classes], the higher the likelier and -inf for out of the question, against the true classes.

    Args:
        labels: int64 [images], the numbers of columns of ``scores``.
        settings: ``chosen`` and ``tried``.
    """
    classes = scores.shape[1]
    places = labels * classes + scores.argmax(1)
    confusion = places.bincount(minlength=classes**2).view(classes, classes).cpu()
    top5 = hits(scores, labels, 5) if classes > 5 else None
    return Scores(hits(scores, labels, 1), top5, confusion, **settings)


def hits(scores: Tensor, labels: Tensor, most: int) -> float:
    """The fraction of images whose class is among so many with the highest scores, and not out of the question."""
    values, found = scores.topk(most, dim=1)
    return float(((found == labels[:, None]) & values.isfinite()).any(1).double().mean())
