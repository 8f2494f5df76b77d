"""Batches that are a pure function of (seed, step).

Which images a batch holds, and how each is cropped and flipped, depends on the seed, the epoch and the image alone: not
on the number of workers, nor on what ran before. A run resumed at any step sees what it would have seen uninterrupted.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from crate_mae.data.folder import ImageFolder
from crate_mae.data.transforms import Size, image_to_tensor, random_resized_crop


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch number `epoch` visits `count` images."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def in_order(count: int, batch_size: int) -> list[range]:
    """Batches of the keys 0 to count - 1, one after the other; the last may be smaller."""
    return [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]


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

    def after(self, batches: int) -> BatchSampler:
        """What follows the first so many batches."""
        start = self.start_step + batches
        return BatchSampler(self.count, self.batch_size, self.seed, start_step=start, end_step=self.end_step)

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


_PATIENCE = 3
"""Times in a row, without a batch between them, that workers are lost before a loader gives up."""

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""Signals that ask for an end. Terminals, batch systems and service managers send them to worker processes, too."""


class LostWorkers(RuntimeError):
    """Processes that load images died again and again."""


class ImageLoader:
    """Batches of images in their order, whatever becomes of the processes that load them.

    A worker that is lost (killed, or out of shared memory) costs time alone: the batches that had not come yet are loaded again
    by new workers, and `say` is told. What an image raises is raised as it is, also where a worker meets it.

    Args:
        images: by key.
        batches: the keys of each batch; iterated over again where workers are started again, with the same result.
        num_workers: processes that load; with 0 this one does.
        pin_memory: into memory that a GPU reads by itself.
        say: takes a line for the user.

    Raises, when iterated over:
        Exception: an image's, an UnreadableImage as a rule.
        LostWorkers: workers were lost three times, and no batch came between.
    """

    def __init__(
        self,
        images: Dataset[torch.Tensor],
        batches: Iterable[Sequence[Any]],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        say: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.images, self.batches, self.say = images, batches, say
        self._settings = {"num_workers": num_workers, "pin_memory": pin_memory}

    def __iter__(self) -> Iterator[torch.Tensor]:
        came = lost = 0
        while True:
            try:
                with contextlib.closing(self._load(came)) as batches:
                    for batch in batches:
                        if isinstance(batch, Exception):
                            raise batch
                        yield batch
                        came, lost = came + 1, 0
                return
            except LostWorkers as error:
                lost += 1
                if lost == _PATIENCE:
                    raise LostWorkers(
                        f"processes that load images were lost {lost} times in a row, the last time by: {error}; "
                        "fewer --images.num_workers, or 0, need less memory, in /dev/shm most of all"
                    ) from None
                self.say(f"a process that loads images was lost ({error}); started again")

    def _load(self, first: int) -> Iterator[torch.Tensor | Exception]:
        """Batches from number `first` on, by workers that are gone when it ends."""
        loader = DataLoader(
            _ErrorsAsItems(self.images),
            batch_sampler=_From(self.batches, first),
            collate_fn=_batch_or_error,
            worker_init_fn=_leave_signals_to_the_main_process,
            # The loader draws a seed for its workers. Drawn from the global generator, it would make the random state after a
            # resumed run differ from an uninterrupted one's.
            generator=torch.Generator(),
            **self._settings,
        )
        if not self._settings["num_workers"]:
            yield from loader
            return
        others, workers, batches, why = set(multiprocessing.active_children()), set(), None, ""
        with contextlib.ExitStack() as until_the_end:
            try:
                try:
                    batches = iter(loader)
                    workers = set(batches._workers)
                except (RuntimeError, OSError):
                    workers = set(multiprocessing.active_children()) - others
                    raise
                finally:
                    until_the_end.enter_context(_losses_met_at_the_next_batch())
                yield from batches
            except (RuntimeError, OSError, EOFError) as error:  # as DataLoader tells that a worker was lost, or failed
                why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            finally:
                del batches  # which asks the workers to end, and waits a while
                if why:
                    gc.collect()  # for an error that a worker sent holds itself, and the batches
                for worker in workers:
                    worker.kill()
                    worker.join()
        if why:
            raise LostWorkers(why)


@contextlib.contextmanager
def _losses_met_at_the_next_batch() -> Iterator[None]:
    """DataLoader's handler raises as soon as a worker dies, in the middle of whatever the main thread does, such as a step.
    While it waits for a batch it looks for dead workers, too, which is soon enough."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


class _From(Sampler[Sequence[Any]]):
    """Batches from number `first` on."""

    def __init__(self, batches: Iterable[Sequence[Any]], first: int) -> None:
        self.batches, self.first = batches, first

    def __iter__(self) -> Iterator[Sequence[Any]]:
        if isinstance(self.batches, BatchSampler):
            return iter(self.batches.after(self.first))
        return itertools.islice(self.batches, self.first, None)


class _ErrorsAsItems(Dataset[Any]):
    """What images raise would come from a worker as a text with its traceback, like the loss of one: it travels in the place of
    the batch."""

    def __init__(self, images: Dataset[torch.Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Any) -> torch.Tensor | Exception:
        try:
            return self.images[key]
        except Exception as error:
            if get_worker_info() is None:
                raise
            try:
                return pickle.loads(pickle.dumps(error))  # as it would come from a worker
            except Exception:
                return RuntimeError(f"{type(error).__name__}: {error}")


def _batch_or_error(items: list[torch.Tensor | Exception]) -> torch.Tensor | Exception:
    return next((item for item in items if isinstance(item, Exception)), None) or default_collate(items)


def _leave_signals_to_the_main_process(worker: int) -> None:
    # They must outlive what asks the run to end, for it to end on a whole step; the main process ends them, or its own end.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
