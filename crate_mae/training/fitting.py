"""Finds the largest batch that fits a device, by trials."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

_GROWTH = 2
"""A trial is at most so many times the largest batch known to fit: the line through two small trials is not yet reliable."""


class Fit(NamedTuple):
    """What fits a device.

    Attributes:
        batch: the most images that fit at once.
        most: how many were asked for; `batch` is no larger.
        needs, room: bytes that a step of `batch` images needs, and bytes that it may take.
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
    """The largest batch whose forward and backward fit the device; a few trials find it.

    Memory is measured as the peak of PyTorch's allocator on CUDA, and as the peak of the process on a CPU, by what Linux says.

    Args:
        step: does forward and backward of so many images, and keeps the gradients, as every micro-batch but the last does.
        device: where the trials run.
        most: the largest batch that is wanted.
        later: bytes that a run will allocate besides.
        processes: that share the host's memory, if the device is a CPU.
        margin: fraction of the memory that is left free, since needs change from step to step.

    Raises:
        ValueError: one image does not fit; or memory cannot be measured here.
    """
    meter = _Cuda(device) if device.type == "cuda" else _Host(processes)
    meter.peak(
        lambda: step(min(2, most))
    )  # libraries and compilers allocate at the first step, which would count for the smallest batch
    room = meter.room() * (1 - margin) - later
    needed: dict[int, float] = {}

    def needs(images: int) -> float:
        needed[images] = meter.peak(lambda: step(images))
        return needed[images]

    batch = largest(needs, room, most)
    return Fit(batch, most, needed[batch], room)


def largest(needs: Callable[[int], float], room: float, most: int) -> int:
    """The largest number from 1 to `most` whose needs fit the room.

    Each trial goes as far as the line through the last two numbers that fit allows, and at most to twice the larger of them.

    Args:
        needs: about linear in the number; infinite if it cannot be done.
        room: what the needs may be.
        most: the largest number.

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
    """Bytes that this process has on a device or can still get; infinity if that cannot be found out.

    Args:
        device: CUDA, or the CPU for the host's memory.
        processes: that share the host's memory.
    """
    try:
        return (_Cuda(device) if device.type == "cuda" else _Host(processes)).room()
    except (OSError, StopIteration, ValueError):
        return math.inf


def peak_memory(device: torch.device) -> int | None:
    """The peak so far, in bytes: of tensors on a CUDA device; on a CPU of this whole process, or None if Linux does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        return round(_kilobytes(Path("/proc/self/status"), "VmHWM"))
    return None


def forget_peak(device: torch.device) -> None:
    """Start the peak anew at what is allocated now; without effect on a CPU where Linux does not allow that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _Host.forget_peak()


class _Cuda:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def room(self) -> float:
        """Bytes that are free, and those that this process holds."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)

    def peak(self, trial: Callable[[], object]) -> float:
        torch.cuda.empty_cache()  # so that what is reserved is what this trial asks for, fragments included
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
    """The memory of this process, as Linux tells it."""

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
        """Bytes that this process holds, and its share of those that are free."""
        available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
        for limit, usage in _limits():
            with suppress(OSError, ValueError):  # no such limit, or "max"
                available = min(available, int(limit.read_text()) - int(usage.read_text()))
        return _kilobytes(Path("/proc/self/status"), "VmRSS") + available / self._processes

    def peak(self, trial: Callable[[], object]) -> float:
        self.forget_peak()
        trial()
        return _kilobytes(Path("/proc/self/status"), "VmHWM")

    @staticmethod
    def forget_peak() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of this process


def _limits() -> Iterator[tuple[Path, Path]]:
    """Pairs of files, (limit, usage) of memory, for each control group of this process and the groups around it."""
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
    """The value in a line such as "VmHWM:   1234 kB", in bytes."""
    return 1024.0 * int(next(re.finditer(rf"^{name}:\s*([0-9]+) kB$", file.read_text(), re.MULTILINE))[1])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
