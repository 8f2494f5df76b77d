"""A moving average of the weights, which forgets where the last steps jumped to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from crate_mae.training.parallel import fill, local


class Average:
    """After step t: a <- d a + (1 - d) w, where d = min(decay, (1 + t) / (10 + t)), so that the random weights of the beginning
    are soon forgotten. Of shards, each rank has the average of its own.

    Args:
        model: whose parameters w are averaged, in float32 as they are, from what they are now.
        decay: at least 0 and below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.tensors = {name: parameter.clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after step number `step` into account, the first of which is 1."""
        update = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        update([*map(local, self.tensors.values())], [*map(local, self.parameters.values())], step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights while the block lasts, and its own again, to the bit, after it."""
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
        """Take up the averages of a state, whole ones by the names of the parameters."""
        fill(self.tensors.values(), [state[name] for name in self.tensors])
