"""What users do with a run as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Callback = Callable[[int, dict[str, Any], nn.Module], object]
"""Takes (step, metrics, model) after each row of metrics.jsonl: how many steps have been taken, the row, and the model with the
weights that would be exported at this step. It may look at the model, and must not change it. What it returns has no meaning, but
for True: then the run is saved, and ends."""


def call(callbacks: Iterable[Callback], row: dict[str, Any], model: nn.Module) -> bool:
    """Call each with a copy of the row; returns whether one has returned True. The run goes on as if it had not: in the mode that
    the model was in, and with the random numbers that it would have drawn."""
    device = next(model.parameters()).device
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            returned = [callback(row["step"], dict(row), model) for callback in callbacks]
        finally:
            model.train(was_training)
    return any(value is True for value in returned)
