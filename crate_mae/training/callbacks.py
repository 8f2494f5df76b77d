"""Functions of the user that a run calls as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Callback = Callable[[int, dict[str, Any], nn.Module], object]
"""Called with (step, metrics, model) after each row of metrics.jsonl: the number of steps taken, the row, and the model with the
weights that would be exported at this step. It must not change the model. If it returns True, the run is saved and ends."""


def call(callbacks: Iterable[Callback], row: dict[str, Any], model: nn.Module) -> bool:
    """Call each with a copy of the row; returns whether one has returned True.

    The calls leave no trace in the run: the model's mode and the random numbers are what they were before."""
    device = next(model.parameters()).device
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            returned = [callback(row["step"], dict(row), model) for callback in callbacks]
        finally:
            model.train(was_training)
    return any(value is True for value in returned)
