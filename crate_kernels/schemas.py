"""What a ``torch.library`` schema cannot say: a gradient nobody asked for, a number that may change. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor


def number_as_tensor(value: float | Tensor) -> Tensor:
    """A number as operators take it. In a tensor it is no constant of a compiled graph, which so serves every value."""
    return value.reshape(()) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def or_empty(grad: Tensor | None, like: Tensor | None) -> Tensor:
    """A schema cannot return an optional tensor: a gradient nobody asked for is an empty one."""
    if grad is None or like is None:
        return torch.empty(0) if like is None else like.new_empty(0)
    return grad.to(like).contiguous()


def empty_gradient(like: Tensor | None, need: bool) -> Tensor:
    """The fake of ``or_empty``."""
    return torch.empty(0) if like is None else like.new_empty(like.shape if need else 0)
