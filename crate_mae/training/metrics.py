"""metrics.jsonl: one JSON object a line, appended as the run goes."""

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
        writes: whether this process does, of several with the same lines.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self._writes = path, writes

    def append(self, **values: Any) -> None:
        if self._writes:
            append(self.path, json.dumps(values) + "\n")

    def sync(self) -> None:
        """Wait until all lines are on the disk: a state must not outlive lines of the steps before it."""
        if self._writes and self.path.exists():  # before the first line
            sync(self.path)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows that there are; lines that are none are left out."""
        with suppress(FileNotFoundError), self.path.open("rb") as lines:
            yield from filter(None, map(_values_of, lines))

    def keep(self, belongs: Callable[[dict[str, Any]], bool]) -> int:
        """Forget the lines that a run going on from an earlier state logs again, and those that are none.

        Returns:
            How many lines were none: cut short, or without a step. The last of a run that was killed may be.
        """
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        lines = content.splitlines()
        values = [_values_of(line) for line in lines]
        kept = b"".join(line + b"\n" for line, value in zip(lines, values, strict=True) if value and belongs(value))
        if kept != content:  # also where the last line has no end, which the next would become a part of
            with replaced(self.path) as file:
                file.write(kept)
        return values.count(None)


class StepAverages(NamedTuple):
    """Means over the steps since the last reading; `waiting` is the fraction of that time in which images were waited for.

    Of steps that were `skipped`, for a gradient too large for float16, there is no gradient norm, and 0 where none has one.
    """

    loss: float
    grad_norm: float
    images_per_second: float
    waiting: float
    skipped: int = 0


class StepMeter:
    """Gathers losses and gradient norms on the device, and reads them back only when asked.

    Reading a number from a GPU waits for all work queued there, so it is done once every so many steps; a value that
    is not finite is still traced to the step it came from.

    Args:
        skips: whether a gradient that is not finite means no step, as of a scaled loss; the loss must be finite still.

    Attributes:
        waited: seconds for which images were waited for, in all; set by who waits.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self.skips = skips
        self._steps: list[int] = []
        self._values: list[torch.Tensor] = []
        self._images_since = 0
        self.waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """What took time until now was no step, and the rate is of the images from now on."""
        self._started, self._images_since, self._waited_before = time.perf_counter(), 0, self.waited

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, images: int) -> torch.Tensor:
        """Returns whether loss or gradient norm were not finite, where they must be, as a float32 1 or 0 on the device."""
        values = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        self._steps.append(step)
        self._values.append(values)
        self._images_since += images
        return values[: 1 if self.skips else 2].isfinite().all().logical_not().float()

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
        """The averages over the steps since the last reading, of which there must be one; errors as of `check`."""
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
        """What a resumed run needs for the averages of an uninterrupted one."""
        return {"steps": list(self._steps), "values": [list(row) for row in self.check()]}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self._steps = list(state["steps"])
        self._values = [torch.tensor(row, device=device) for row in state["values"]]


class ProgressLines:
    """Says in lines, at most one every so many seconds, what else a progress bar would show."""

    def __init__(self, step: int, total_steps: int, pace: Pace, *, seconds: float = 30.0) -> None:
        self.step, self.total_steps, self.pace, self.seconds = step, total_steps, pace, seconds
        self._began, self._waited_before = time.perf_counter(), 0.0

    def after(self, step: int, loss: torch.Tensor, lr: float, batch: int, waited: float) -> str | None:
        """The line due after `step`, if one is; only then is `loss`, that step's own, read from the device.

        Args:
            waited: seconds for which images were waited for since the run began.
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
        weights: the name of such a weight, where it is known that it was the first.
    """

    def __init__(self, step: int, loss: float, grad_norm: float, weights: str = "") -> None:
        what = f"weights of {weights} are not finite after it" if weights else f"loss {loss}, gradient norm {grad_norm}"
        super().__init__(f"step {step}: {what}")
        self.step, self.loss, self.grad_norm, self.weights = step, loss, grad_norm, weights


def _values_of(line: bytes) -> dict[str, Any] | None:
    """The values in a line; None where a machine that went down left something else."""
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
