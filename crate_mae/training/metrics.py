"""metrics.jsonl: one JSON object a line, appended as the run goes."""

from __future__ import annotations

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crate_mae.files import append, replaced


class MetricsLog:
    """Appends lines to metrics.jsonl. Every line has `step`, the number of optimiser steps taken by then."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **values: Any) -> None:
        append(self.path, json.dumps(values) + "\n")

    def drop_after(self, step: int) -> None:
        """Forget what a run logged between its last saved state and its end; the resumed run logs it again."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            with replaced(self.path) as file:
                file.write("".join(line + "\n" for line in lines if _step_of(line) <= step).encode())


class StepAverages(NamedTuple):
    """Means over the steps since the last reading."""

    loss: float
    grad_norm: float
    images_per_second: float


class StepMeter:
    """Gathers losses and gradient norms on the device, and reads them back only when asked.

    Reading a number from a GPU waits for all work queued there, so it is done once every so many steps; a value that
    is not finite is still traced to the step it came from.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._values: list[torch.Tensor] = []
        self._images = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        self._started = time.perf_counter()

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, images: int) -> None:
        self._steps.append(step)
        self._values.append(torch.stack([loss.detach().float(), grad_norm.detach().float()]))
        self._images += images

    @property
    def pending(self) -> bool:
        """Whether a step was added since the last reading."""
        return bool(self._steps)

    def read(self) -> StepAverages:
        """The averages; at least one step must have been added since the last reading.

        Raises:
            NonFiniteLoss: a loss or gradient norm was NaN or infinite.
        """
        rows = torch.stack(self._values).tolist()
        for step, (loss, grad_norm) in zip(self._steps, rows, strict=True):
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise NonFiniteLoss(step, loss, grad_norm)
        elapsed = time.perf_counter() - self._started
        losses, grad_norms = zip(*rows, strict=True)
        averages = StepAverages(sum(losses) / len(rows), sum(grad_norms) / len(rows), self._images / elapsed)
        self._steps, self._values, self._images = [], [], 0
        self.restart_clock()
        return averages


class ProgressLines:
    """Says in lines, at most one every so many seconds, what else a progress bar would show."""

    def __init__(self, step: int, total_steps: int, *, seconds: float = 30.0) -> None:
        self.step, self.total_steps, self.seconds = step, total_steps, seconds
        self._began = time.perf_counter()

    def after(self, step: int, loss: torch.Tensor, lr: float, batch: int) -> str | None:
        """The line due after `step`, if one is; only then is `loss`, that step's own, read from the device."""
        elapsed = time.perf_counter() - self._began
        if elapsed < self.seconds:
            return None
        steps_per_second = (step - self.step) / elapsed
        left = timedelta(seconds=round((self.total_steps - step) / steps_per_second))
        self.step, self._began = step, time.perf_counter()
        return (
            f"step {step}/{self.total_steps}: loss {loss.item():.4f}, lr {lr:.2e}, "
            f"{steps_per_second * batch:.1f} images/s, {left} left"
        )


class NonFiniteLoss(RuntimeError):
    """Training broke down: the loss or the gradient of `step` is NaN or infinite."""

    def __init__(self, step: int, loss: float, grad_norm: float) -> None:
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; "
            "try a lower --optimizer.base_lr, a longer --schedule.warmup_epochs or --run.precision float32"
        )
        self.step = step


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf  # a line cut short when the machine went down
