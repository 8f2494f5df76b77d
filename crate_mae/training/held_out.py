"""What measures a model on images held out from training, the same ones each time."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset

from crate_mae.classifiers import Classifier
from crate_mae.data import ImageLoader, Normalization, UnreadableImage, in_order, part_of
from crate_mae.model import CrateMAE
from crate_mae.training.divergence import Measured
from crate_mae.training.ranks import Ranks

Model = TypeVar("Model", bound="CrateMAE | Classifier")
Errors = TypeVar("Errors", bound=Measured)


class HeldOut(ABC, Generic[Model, Errors]):
    """Measures a model on images held out; the model keeps its mode, train or eval.

    Args:
        images: a dataset of their pixels, uint8, and of what belongs to them.
        count: how many images there are.
        normalization: of the pixels.
        batch_size: images that are measured at once, by all ranks together.
        precision: "float32", or the dtype of autocast.
        num_workers: processes that load images.
        say: takes a line for the user.
        unreadable: told of images that cannot be read; another image stands in for each.
        ranks: each measures a part of each batch, and all get the errors of all images.
    """

    def __init__(
        self,
        images: Dataset[Any],
        count: int,
        normalization: Normalization,
        *,
        batch_size: int,
        precision: str = "float32",
        num_workers: int = 0,
        say: Callable[[str], None] = warnings.warn,
        unreadable: Callable[[Sequence[UnreadableImage]], None] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.normalization, self.precision, self.ranks = normalization, precision, ranks or Ranks()
        self._sizes = [len(batch) for batch in in_order(count, batch_size)]
        batches = [part_of(batch, self.ranks.rank, self.ranks.count) for batch in in_order(count, batch_size)]
        self._loader = ImageLoader(images, batches, num_workers=num_workers, say=say, unreadable=unreadable)

    def __call__(self, model: Model) -> Errors:
        """The errors of a model."""
        errors = self.unless(model, lambda: False)
        assert errors is not None
        return errors

    @abstractmethod
    @torch.no_grad()
    def unless(self, model: Model, stopped: Callable[[], object]) -> Errors | None:
        """The errors of a model; None if `stopped` returned true before the last batch."""
