"""metrics.jsonl, with a JSON object in each line; and the averages and progress lines that are made of steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crate_mae.files import append, replaced, sync
from crate_mae.training.pace import Pace


class MetricsLog:
    """Appends lines to metrics.jsonl. Every line has `step`, the number of optimiser steps taken by then.

    Args:
        path: the file.
        writes: whether this process writes it; of several ranks, all of which have the same lines, one does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self._writes = path, writes

    def append(self, **values: Any) -> None:
        if self._writes:
            append(self.path, json.dumps(values) + "\n")

    def sync(self) -> None:
        """Wait until all lines are on the disk: a state must not outlive lines of the steps before it."""
        if self._writes and self.path.exists():  # not before the first line
            sync(self.path)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows so far, without broken lines."""
        with suppress(FileNotFoundError), self.path.open("rb") as lines:
            yield from filter(None, map(_values_of, lines))

    def keep(self, belongs: Callable[[dict[str, Any]], bool]) -> int:
        """Remove broken lines, and rows that do not belong: those that a run going on from an earlier state will log again.

        Args:
            belongs: whether a row stays.

        Returns:
            How many lines were broken: cut short, as the last one of a run that was killed may be, or without a step.
        """
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        lines = content.splitlines()
        values = [_values_of(line) for line in lines]
        kept = b"".join(line + b"\n" for line, value in zip(lines, values, strict=True) if value and belongs(value))
        if kept != content:  # also if the last line lacks its line break: the next row would be appended to it
            with replaced(self.path) as file:
                file.write(kept)
        return values.count(None)


class StepAverages(NamedTuple):
    """Means over the steps since the last reading.

    Attributes:
        loss: mean loss.
        grad_norm: mean norm of the gradient over the steps that were not skipped; 0 if all were.
        images_per_second: how fast they went.
        waiting: fraction of the time in which the host waited for images.
        skipped: steps that were skipped, because the gradient was too large for float16.
    """

    loss: float
    grad_norm: float
    images_per_second: float
    waiting: float
    skipped: int = 0


class StepMeter:
    """Gathers losses and gradient norms on the device, and reads them back only when asked.

    Reading a number from a GPU waits for all work queued there, so it is done once in many steps; a value that is not finite is
    still traced to its step.

    Args:
        skips: whether a step with a gradient that is not finite is skipped, as when the loss is scaled. The loss itself must be
            finite anyway.

    Attributes:
        waited: seconds in all in which the host waited for images; set from outside.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self.skips = skips
        self._steps: list[int] = []
        self._values: list[torch.Tensor] = []
        self._images_since = 0
        self.waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure the rate of images from now on: what took time until now was no step."""
        self._started, self._images_since, self._waited_before = time.perf_counter(), 0, self.waited

    def add(self, step: int, values: torch.Tensor, images: int) -> None:
        """Add a step, of which values [2] are the loss and the norm of the gradient."""
        self._steps.append(step)
        self._values.append(values)
        self._images_since += images

    def check(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step since the last reading.

        Raises:
            NonFiniteLoss: one of them was NaN or infinite.
        """
        rows = torch.stack(self._values).tolist() if self._values else []
        for step, (loss, grad_norm) in zip(self._steps, rows, strict=True):
            if not (math.isfinite(loss) and (math.isfinite(grad_norm) or self.skips)):
                raise NonFiniteLoss(step, loss, grad_norm)
        return rows

    def read(self) -> StepAverages:
        """The averages over the steps since the last reading, of which there must be at least one; errors as of `check`."""
        rows = self.check()
        elapsed = time.perf_counter() - self._started
        losses = [loss for loss, _ in rows]
        grad_norms = [norm for _, norm in rows if math.isfinite(norm)]
        averages = StepAverages(
            sum(losses) / len(rows),
            sum(grad_norms) / max(1, len(grad_norms)),
            self._images_since / elapsed,
            (self.waited - self._waited_before) / elapsed,
            len(rows) - len(grad_norms),
        )
        self._steps, self._values = [], []
        self.restart_clock()
        return averages

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to log the same averages as an uninterrupted one."""
        return {"steps": list(self._steps), "values": [list(row) for row in self.check()]}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self._steps = list(state["steps"])
        self._values = [torch.tensor(row, device=device) for row in state["values"]]


class ProgressLines:
    """Lines in place of a progress bar, at most one every so many seconds."""

    def __init__(self, step: int, total_steps: int, pace: Pace, *, seconds: float = 30.0) -> None:
        self.step, self.total_steps, self.pace, self.seconds = step, total_steps, pace, seconds
        self._began, self._waited_before = time.perf_counter(), 0.0

    def after(self, step: int, loss: torch.Tensor, lr: float, batch: int, waited: float) -> str | None:
        """The line due after `step`, if one is. The step's `loss` is only read from the device if one is due.

        Args:
            waited: seconds in which the host waited for images since the run began.
        """
        elapsed = time.perf_counter() - self._began
        if elapsed < self.seconds:
            return None
        steps_per_second = (step - self.step) / elapsed
        rate = steps_per_second * batch
        left = timedelta(seconds=round((self.total_steps - step) / steps_per_second))
        waiting = (waited - self._waited_before) / elapsed
        self.step, self._began, self._waited_before = step, time.perf_counter(), waited
        return (
            f"step {step}/{self.total_steps}: loss {loss.item():.4f}, lr {lr:.2e}, "
            f"{rate:.1f} images/s, {waiting:.0%} of the time waiting for images, {self.pace.in_words(rate)}, {left} left"
        )


class NonFiniteLoss(RuntimeError):
    """Training broke down: the loss or the gradient of `step`, or the weights after it, are NaN or infinite.

    Args:
        weights: the name of the first weight that is not finite, if that is what broke down.
    """

    def __init__(self, step: int, loss: float, grad_norm: float, weights: str = "") -> None:
        what = f"weights of {weights} are not finite after it" if weights else f"loss {loss}, gradient norm {grad_norm}"
        super().__init__(f"step {step}: {what}")
        self.step, self.loss, self.grad_norm, self.weights = step, loss, grad_norm, weights


def _values_of(line: bytes) -> dict[str, Any] | None:
    """The values in a line; None if the line is broken, as after a crash of the machine."""
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
