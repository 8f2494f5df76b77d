"""Moves batches to the device, and measures how long the host waits for them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator

import torch

from crate_mae.data import Sample, augmented
from crate_mae.data.in_processes import usable_cores

Batch = tuple[torch.Tensor, torch.Tensor]
"""Pixels, and what the loss takes beside them."""

_MOST_WORKERS = 16
_BATCHES_EACH = 3
"""Batches that a worker holds at once: two that wait to be used, and the one it makes."""


class Feed:
    """Iterates over batches on the device, as pairs (pixels, beside).

    Pixels are uint8 [batch, channels, height, width], flipped and blurred. `beside` is another field of the samples: the noise
    [batch, patches] that fixes the masks, or the classes. On CUDA, batches are copied on a stream of their own while the step
    before computes.

    Args:
        batches: on the host.
        device: where they go.
        beside: the name of the other field.

    Attributes:
        waited: seconds that the host has waited for batches in all. A GPU may have been busy with queued work meanwhile.
    """

    def __init__(self, batches: Iterable[Sample], device: torch.device, beside: str = "noise") -> None:
        self.waited = 0.0
        self._batches, self._device, self._beside = batches, device, beside
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._batches)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield self._on_device(batch)

    def _on_device(self, batch: Sample) -> Batch:
        beside: torch.Tensor = getattr(batch, self._beside)
        if self._copying is None:
            return augmented(batch, self._device), beside
        with torch.cuda.stream(self._copying):
            pixels, beside = augmented(batch, self._device), beside.to(self._device, non_blocking=True)
        step = torch.cuda.current_stream(self._device)
        step.wait_stream(self._copying)
        for tensor in (pixels, beside):
            tensor.record_stream(step)  # else the copying stream could use the memory again before the step is done
        return pixels, beside


def workers_for(asked: int | str, device: torch.device, threads: int, batch_bytes: int, processes: int = 1) -> int:
    """How many loader processes each training process has.

    Args:
        asked: a number, or "auto": one for each core that is not busy with training (one core beside a GPU, all threads on a
            CPU), at most 16, and no more than fit shared memory.
        device: where the run trains.
        threads: CPU threads that compute; 0 for all cores.
        batch_bytes: the size of a batch's pixels.
        processes: training processes on this machine, which share its cores and memory.
    """
    if asked != "auto":
        return int(asked)
    cores = usable_cores() // processes
    busy = 1 if device.type != "cpu" else threads or cores
    room = _shared_memory() // (2 * _BATCHES_EACH * batch_bytes * processes)
    return max(0, min(cores - busy, _MOST_WORKERS, room))


def _shared_memory() -> int:
    """Free bytes for batches on their way between processes; containers often have 64 MiB only."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:  # systems other than Linux have no such limit
        return 2**63
