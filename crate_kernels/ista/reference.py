"""What ISTA means, in the official order of operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def ista(x: Tensor, weight: Tensor, step_size: float, lambd: float, soft: bool) -> Tensor:
    reconstruction = F.linear(x, weight)
    grad_1 = F.linear(reconstruction, weight.t())
    grad_2 = F.linear(x, weight.t())
    if soft:
        return F.softshrink(x + step_size * (grad_2 - grad_1), step_size * lambd)
    return F.relu(x + (step_size * (grad_2 - grad_1) - step_size * lambd))
