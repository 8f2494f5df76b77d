"""Batches on their way to the device, and how long was waited for them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator

import torch

from crate_mae.data import Sample, augmented
from crate_mae.data.in_processes import usable_cores

_MOST_WORKERS = 16
_BATCHES_EACH = 3
"""Batches that a worker has made and that are not used yet: two ahead, and the one it is at."""


class Feed:
    """Batches on the device, as (pixels, what goes with them): pixels uint8 [batch, channels, height, width] with flips and blurs
    done; and noise [batch, patches], which fixes the masks, or another field of the samples.

    On CUDA they are copied on a stream of their own, under the step before, which the host has long queued.

    Args:
        beside: which field goes with the pixels.

    Attributes:
        waited: seconds that the host has waited for batches in all; while it waits a GPU still works off what is queued.
    """

    def __init__(self, batches: Iterable[Sample], device: torch.device, beside: str = "noise") -> None:
        self.waited = 0.0
        self._batches, self._device, self._beside = batches, device, beside
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = iter(self._batches)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield self._on_device(batch)

    def _on_device(self, batch: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        beside: torch.Tensor = getattr(batch, self._beside)
        if self._copying is None:
            return augmented(batch, self._device), beside
        with torch.cuda.stream(self._copying):
            pixels, beside = augmented(batch, self._device), beside.to(self._device, non_blocking=True)
        step = torch.cuda.current_stream(self._device)
        step.wait_stream(self._copying)
        for tensor in (pixels, beside):
            tensor.record_stream(
                step
            )  # its memory is the other stream's, and must not be used again before the step is done
        return pixels, beside


def workers_for(asked: int | str, device: torch.device, threads: int, batch_bytes: int, processes: int = 1) -> int:
    """How many processes load images, for each of those that train.

    Args:
        asked: a number, or "auto": one for each core that nothing else computes on, at most 16, and no more than shared memory
            has room for. Beside a GPU, the host takes a core; on a CPU, training takes as many as it has threads.
        batch_bytes: of a batch's pixels.
        processes: that train on this machine, and share its cores and memory.
    """
    if asked != "auto":
        return int(asked)
    cores = usable_cores() // processes
    busy = 1 if device.type != "cpu" else threads or cores
    room = _shared_memory() // (2 * _BATCHES_EACH * batch_bytes * processes)
    return max(0, min(cores - busy, _MOST_WORKERS, room))


def _shared_memory() -> int:
    """Bytes that are free for batches on their way between processes; containers often have 64 MiB."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:  # other systems have it elsewhere, without such a limit
        return 2**63
