"""Batches that are a pure function of (seed, step).

Which images a batch holds, and how each is cropped, flipped and masked, depends only on the seed, the epoch and the image, not on
the number of workers or ranks, nor on earlier steps. A run resumed at any step sees what it would have seen uninterrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

from crate_mae.data.source import Source

Key = tuple[int, int]
"""(pass, image): the image, and how often it was visited before: the epoch, unless sources have weights."""

Batch = TypeVar("Batch", range, torch.Tensor)


def in_order(count: int, batch_size: int) -> list[range]:
    """Batches of the keys 0 to count - 1, one after the other; the last may be smaller."""
    return [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]


def part_of(batch: Batch, rank: int, ranks: int) -> Batch:
    """The part of a batch that a rank validates; a rank without images gets the first, as all ranks must compute together."""
    part = batch[rank::ranks]
    return part if len(part) else batch[:1]


class BatchSampler(Sampler[list[Key]]):
    """Batches of keys for steps `start_step` to `end_step`, running on across epochs.

    The images that do not fill an epoch's last batch are left out of that epoch. One sampler for the whole run, rather
    than one an epoch, keeps worker processes busy over the seam.

    Args:
        source: the images; its `epoch` says which are visited, and in which order.
        batch_size: images a step, over all ranks.
        rank, ranks: which of how many parts of each batch; together the parts are the batch of a single rank. Where it does not
            divide evenly, the first ranks have one image more.
        accumulate: into how many successive batches a rank's part is split.

    Raises:
        ValueError: there are fewer images than a batch, or fewer images in one than ranks.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        start_step: int,
        end_step: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        _skip: int = 0,
    ) -> None:
        if not 0 < batch_size <= len(source):
            raise ValueError(
                f"batch_size: expected 1 to {len(source)}, the number of training images, got {batch_size}"
            )
        if not 0 <= rank < ranks <= batch_size:
            raise ValueError(f"rank: expected 0 to ranks - 1, and at most {batch_size} ranks, got {rank} of {ranks}")
        if not 1 <= accumulate <= batch_size // ranks:
            raise ValueError(
                f"accumulate: expected 1 to {batch_size // ranks}, the images of a batch for each rank, got {accumulate}"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.start_step, self.end_step = start_step, end_step
        self.rank, self.ranks, self.accumulate, self._skip = rank, ranks, accumulate, _skip

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * self.accumulate - self._skip

    def after(self, batches: int) -> BatchSampler:
        """The sampler without its first so many batches."""
        steps, skip = divmod(self._skip + batches, self.accumulate)
        return BatchSampler(
            self.source,
            self.batch_size,
            self.seed,
            start_step=self.start_step + steps,
            end_step=self.end_step,
            rank=self.rank,
            ranks=self.ranks,
            accumulate=self.accumulate,
            _skip=skip,
        )

    def __iter__(self) -> Iterator[list[Key]]:
        steps_per_epoch = len(self.source) // self.batch_size
        visits: Sequence[np.ndarray] = ()
        ordered_epoch, skip = -1, self._skip
        for step in range(self.start_step, self.end_step):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != ordered_epoch:
                visits, ordered_epoch = self.source.epoch(self.seed, epoch), epoch
            whole = slice(position * self.batch_size, (position + 1) * self.batch_size)
            for part in range(self.rank + skip * self.ranks, self.ranks * self.accumulate, self.ranks):
                passes, images = (of_epoch[whole][part :: self.ranks * self.accumulate].tolist() for of_epoch in visits)
                yield list(zip(passes, images, strict=True))
            skip = 0
