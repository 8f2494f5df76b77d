"""The largest batch that fits a device, found by trying."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

_GROWTH = 2
"""How many times the largest batch that is known to fit the next trial may have: memory grows with the batch as a line does, and
two small trials tell less of it than large ones."""


class Fit(NamedTuple):
    """What fits a device.

    Attributes:
        batch: the most images at once, of those that were asked for.
        most: how many were asked for.
        needs, room: bytes that a step of that batch needs, and that it may.
    """

    batch: int
    most: int
    needs: float
    room: float

    @property
    def in_words(self) -> str:
        images = f"{self.batch} image{'s' * (self.batch > 1)} at once"
        of_room = f"{_gib(self.needs)} of {_gib(self.room)} GiB"
        if self.batch == self.most:
            return f"a device takes its {images}, in {of_room}"
        return f"a device takes {images}, in {of_room}, and one more would not fit"


def fit(
    step: Callable[[int], object],
    device: torch.device,
    most: int,
    *,
    later: int = 0,
    processes: int = 1,
    margin: float = 0.1,
) -> Fit:
    """The largest batch of which forward and backward fit the device; it is found in a few steps.

    On CUDA, memory is what PyTorch's allocator takes at most; on a CPU, what the process has at most, which Linux tells.

    Args:
        step: does them, with so many images, and leaves the gradients, as all parts of a step but the last one do.
        most: images that are asked for.
        later: bytes that will be allocated besides, once steps are taken.
        processes: that share the host's memory, where that is the device's.
        margin: fraction of the memory that is left free, for what changes from step to step.

    Raises:
        ValueError: one image does not fit; or memory cannot be measured here.
    """
    meter = _Cuda(device) if device.type == "cuda" else _Host(processes)
    meter.peak(
        lambda: step(min(2, most))
    )  # what is allocated once, by libraries and compilers, is there before all others
    room = meter.room() * (1 - margin) - later
    needed: dict[int, float] = {}

    def needs(images: int) -> float:
        needed[images] = meter.peak(lambda: step(images))
        return needed[images]

    batch = largest(needs, room, most)
    return Fit(batch, most, needed[batch], room)


def largest(needs: Callable[[int], float], room: float, most: int) -> int:
    """The largest number from 1 to `most` whose needs fit the room.

    No number is tried that a line through the last two that fit puts beyond it, nor one above twice the largest of these.

    Args:
        needs: grows with the number, about as a line; infinite where it cannot be.

    Raises:
        ValueError: not even 1 fits.
    """
    if (first := needs(1)) > room:
        raise ValueError(
            f"schedule.accumulate: one image at once does not fit: it needs {_gib(first)} of {_gib(room)} GiB; "
            "--run.recompute true and --run.stream 16bit need less, and so does a smaller model"
        )
    fitting, beyond = [(1, first)], most + 1
    while (low := fitting[-1][0]) + 1 < beyond:
        on_the_line = _on_the_line(fitting, room, most)
        if on_the_line <= low:
            break
        bound = beyond - 1 if beyond > most else (low + beyond) // 2
        tried = max(low + 1, min(on_the_line, _GROWTH * low, bound))
        if (needed := needs(tried)) <= room:
            fitting.append((tried, needed))
        else:
            beyond = tried
    return fitting[-1][0]


def _on_the_line(fitting: list[tuple[int, float]], room: float, most: int) -> int:
    """The largest number, up to `most`, that a line through the last two that fit keeps in the room; 2 if one alone was tried."""
    if len(fitting) == 1:
        return 2
    (few, less), (many, more) = fitting[-2:]
    slope = (more - less) / (many - few)
    return many + math.floor(min((room - more) / slope, most)) if slope > 0 else most


def room(device: torch.device, processes: int = 1) -> float:
    """Bytes that this process may have of a device, with those that it has; infinitely many where nothing tells.

    Args:
        processes: that share the host's memory, where that is the device's.
    """
    try:
        return (_Cuda(device) if device.type == "cuda" else _Host(processes)).room()
    except (OSError, StopIteration, ValueError):
        return math.inf


def peak_memory(device: torch.device) -> int | None:
    """The most bytes so far: of tensors on a CUDA device, or of this whole process on the host, where Linux tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        return round(_kilobytes(Path("/proc/self/status"), "VmHWM"))
    return None


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` be of what comes from now on, with what there is; where Linux cannot forget, it stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _Host.forget_peak()


class _Cuda:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def room(self) -> float:
        """Bytes that are free, or this process' own."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)

    def peak(self, trial: Callable[[], object]) -> float:
        torch.cuda.empty_cache()  # so that what is reserved is what this trial asks for, with what it leaves between
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            trial()
            torch.cuda.synchronize(self._device)
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_reserved(self._device)


class _Host:
    """The memory of this process, by what Linux says of it."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        try:
            self.forget_peak()
        except (OSError, StopIteration) as error:
            raise ValueError(
                f"schedule.batch_size and schedule.accumulate: expected numbers, since here the memory of a CPU cannot be "
                f"measured ({error}), got auto"
            ) from error

    def room(self) -> float:
        """Bytes of this process, and its share of those that are free."""
        available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
        for limit, usage in _limits():
            with suppress(OSError, ValueError):  # there is none, or it is "max"
                available = min(available, int(limit.read_text()) - int(usage.read_text()))
        return _kilobytes(Path("/proc/self/status"), "VmRSS") + available / self._processes

    def peak(self, trial: Callable[[], object]) -> float:
        self.forget_peak()
        trial()
        return _kilobytes(Path("/proc/self/status"), "VmHWM")

    @staticmethod
    def forget_peak() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the highest of this process starts anew


def _limits() -> Iterator[tuple[Path, Path]]:
    """Files with what the control groups of this process, and those around them, may have of memory, and with what they have."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
            if controllers:  # of version 1
                root, names = root / controllers, ("memory.limit_in_bytes", "memory.usage_in_bytes")
            own = root / path.lstrip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(root):
                    yield group / names[0], group / names[1]


def _kilobytes(file: Path, name: str) -> float:
    """A value of the kind "VmHWM:   1234 kB", in bytes."""
    return 1024.0 * int(next(re.finditer(rf"^{name}:\s*([0-9]+) kB$", file.read_text(), re.MULTILINE))[1])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
