"""Batches that are a pure function of (seed, step).

Which images a batch holds, and how each is cropped and flipped, depends on the seed, the epoch and the image alone: not
on the number of workers, nor on what ran before. A run resumed at any step sees what it would have seen uninterrupted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from crate_mae.data.folder import ImageFolder, UnreadableImage
from crate_mae.data.transforms import Size, image_to_tensor, random_resized_crop


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch number `epoch` visits `count` images."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, image index) for steps `start_step` to `end_step`, running on across epochs.

    The images that do not fill an epoch's last batch are left out of that epoch. One sampler for the whole run, rather
    than one an epoch, keeps worker processes busy over the seam.
    """

    def __init__(self, count: int, batch_size: int, seed: int, *, start_step: int, end_step: int) -> None:
        if not 0 < batch_size <= count:
            raise ValueError(f"batch_size: expected 1 to {count}, the number of training images, got {batch_size}")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start_step, self.end_step = start_step, end_step

    def __len__(self) -> int:
        return self.end_step - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.count // self.batch_size
        order, ordered_epoch = None, None
        for step in range(self.start_step, self.end_step):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != ordered_epoch:
                order, ordered_epoch = epoch_order(self.count, self.seed, epoch), epoch
            first = position * self.batch_size
            yield [(epoch, int(index)) for index in order[first : first + self.batch_size]]


class PretrainImages(Dataset[torch.Tensor]):
    """Augmented images by (epoch, image index): a random resized crop, then a horizontal flip half of the time."""

    def __init__(
        self,
        folder: ImageFolder,
        size: Size,
        seed: int,
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> None:
        self.folder, self.size, self.seed = folder, size, seed
        self.scale, self.ratio, self.flip = scale, ratio, flip

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        image = random_resized_crop(self.folder.image(index), self.size, rng, scale=self.scale, ratio=self.ratio)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image_to_tensor(image)


class ImageLoader(DataLoader[torch.Tensor]):
    """A DataLoader of images that raises `UnreadableImage` as it is, also where a worker process meets the file.

    What a worker raises would else come as a text, with its traceback; here it travels in the place of the batch.
    """

    def __init__(self, images: Dataset[torch.Tensor], **settings: Any) -> None:
        super().__init__(
            _ErrorsAsItems(images),
            collate_fn=_batch_or_error,
            worker_init_fn=_leave_interrupts_to_the_main_process,
            **settings,
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in super().__iter__():
            if isinstance(batch, UnreadableImage):
                raise batch
            yield batch


class _ErrorsAsItems(Dataset[Any]):
    def __init__(self, images: Dataset[torch.Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Any) -> torch.Tensor | UnreadableImage:
        try:
            return self.images[key]
        except UnreadableImage as error:
            return error


def _batch_or_error(items: list[torch.Tensor | UnreadableImage]) -> torch.Tensor | UnreadableImage:
    return next((item for item in items if isinstance(item, UnreadableImage)), None) or default_collate(items)


def pretrain_loader(
    images: PretrainImages, sampler: BatchSampler, *, num_workers: int = 0, pin_memory: bool = False
) -> ImageLoader:
    """Batches of uint8 [batch, channels, height, width], in the sampler's order."""
    # A generator of its own: the loader draws a base seed for its workers, and drawing it from the global generator
    # would make the random state after a resumed run differ from an uninterrupted one's.
    generator = torch.Generator().manual_seed(images.seed)
    return ImageLoader(
        images, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin_memory, generator=generator
    )


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    # A terminal sends Ctrl-C to the workers too; they must outlive it for the run to end on a whole step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
