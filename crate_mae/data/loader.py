"""Batches of images in their order, whatever becomes of the processes that load them, and of single images."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from crate_mae.data.batches import BatchSampler
from crate_mae.data.samples import batch_of
from crate_mae.data.source import UnreadableImage

_PATIENCE = 3
"""How often in a row, without a batch in between, workers may be lost before a loader gives up."""

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""Signals that ask a process to end. Terminals, batch systems and service managers send them to worker processes, too."""


class LostWorkers(RuntimeError):
    """Processes that load images died again and again."""


class ImageLoader:
    """Batches of images in their order, even when processes that load them die.

    A lost worker (killed, or out of shared memory) only costs time: new workers load the batches that had not arrived, and `say`
    is told. Errors of images are raised as they are, also from a worker; unreadable images may be left to `unreadable`.

    Args:
        images: by key, as for `samples.batch_of`.
        batches: the keys of each batch; iterated over again after a loss of workers, and must then be the same.
        num_workers: processes that load; with 0 this process loads.
        pin_memory: whether batches are in pinned memory.
        say: takes a line for the user.
        unreadable: called with the images that cannot be read, before the batch that has others in their place, or before the
            error where no other can be read, either; it may raise.

    Raises, when iterated over:
        Exception: an image's, an UnreadableImage as a rule.
        LostWorkers: workers were lost three times, and no batch came between.
    """

    def __init__(
        self,
        images: Dataset[Any] | Sequence[Any],
        batches: Iterable[Sequence[Any]],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        say: Callable[[str], None] = warnings.warn,
        unreadable: Callable[[Sequence[UnreadableImage]], None] | None = None,
    ) -> None:
        self.images, self.batches, self.say, self.unreadable = images, batches, say, unreadable
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def __iter__(self) -> Generator[Any]:
        came = lost = 0
        while True:
            try:
                with contextlib.closing(self._load(came)) as batches:
                    for batch, met in batches:
                        if met and self.unreadable:
                            self.unreadable(met)
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

    def _load(self, first: int) -> Generator[tuple[Any, list[UnreadableImage]]]:
        """Batches from number `first` on; their workers are gone when the generator ends."""
        loader = DataLoader(
            _Batches(self.images, replace=self.unreadable is not None),
            batch_sampler=_From(self.batches, first),  # type: ignore[arg-type]  # the stub asks for lists; any sequence will do
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_main_process,
            # The loader draws a seed for its workers. From the global generator, that would change the random state, which
            # must be the same in a resumed run and in an uninterrupted one.
            generator=torch.Generator(),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        if not self.num_workers:
            yield from loader
            return
        others, workers, batches, why = set(multiprocessing.active_children()), set[Any](), None, ""
        with contextlib.ExitStack() as until_the_end:
            try:
                try:
                    batches = iter(loader)
                    workers = set(batches._workers)  # type: ignore[attr-defined]  # of the iterator over several processes
                except (RuntimeError, OSError):
                    workers = set(multiprocessing.active_children()) - others
                    raise
                finally:
                    until_the_end.enter_context(_losses_met_at_the_next_batch())
                yield from batches
            except (RuntimeError, OSError, EOFError) as error:  # as DataLoader tells that a worker was lost, or failed
                why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            finally:
                del batches  # asks the workers to end, and waits a while
                if why:
                    gc.collect()  # an error from a worker refers to itself and to the batches
                for worker in workers:
                    worker.kill()
                    worker.join()
        if why:
            raise LostWorkers(why)


@contextlib.contextmanager
def _losses_met_at_the_next_batch() -> Iterator[None]:
    """A block without DataLoader's signal handler, which raises as soon as a worker dies, in the middle of a training step.
    DataLoader also looks for dead workers while it waits for a batch, which is soon enough."""
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


class _Batches(Dataset[Any]):
    """Pairs (batch, images that could not be read), by the keys of a batch.

    An error of an image takes the place of the batch: raised in a worker, it would arrive as a text, like the loss of a worker.
    """

    def __init__(self, images: Dataset[Any] | Sequence[Any], *, replace: bool) -> None:
        self.images, self.replace = images, replace

    def __getitems__(self, keys: Sequence[Any]) -> tuple[Any, list[UnreadableImage]]:
        met: list[UnreadableImage] = []
        try:
            return batch_of(self.images, keys, met if self.replace else None), met
        except Exception as error:
            if get_worker_info() is None:
                return error, met
            try:
                return pickle.loads(pickle.dumps(error)), met  # as it would come from a worker
            except Exception:
                return RuntimeError(f"{type(error).__name__}: {error}"), met


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Workers must survive these signals, so that the run can end after a whole step; the main process ends its workers.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
