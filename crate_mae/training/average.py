"""A moving average of the weights, which smooths the noise of the last steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from crate_mae.training.parallel import fill, local


class Average:
    """The average a of the weights w: after step t, a <- d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)).

    The decay d is small at first, so that the random weights of the beginning are soon forgotten. Where ranks have shards of the
    weights, each averages its own shard.

    Args:
        model: whose parameters are averaged, in float32; the average starts at their present values.
        decay: at least 0 and below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.tensors = {name: parameter.clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after step number `step`, counted from 1."""
        update = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        update([*map(local, self.tensors.values())], [*map(local, self.parameters.values())], step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block lasts the model's weights are the average; after it they are its own again, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self.tensors.items():
            ours, other = local(self.parameters[name]), local(tensor)
            kept = ours.clone()
            ours.copy_(other)
            other.copy_(kept)

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.tensors)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the averages of a saved state: whole tensors by the names of the parameters."""
        fill(self.tensors.values(), [state[name] for name in self.tensors])
