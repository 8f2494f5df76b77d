"""What ISTA means, in the official order of operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def ista(x: Tensor, dictionary: Tensor, step_size: float | Tensor, lambd: float | Tensor, soft: bool) -> Tensor:
    reconstruction = F.linear(x, dictionary)
    grad_1 = F.linear(reconstruction, dictionary.t())
    grad_2 = F.linear(x, dictionary.t())
    if soft:  # not softshrink, which takes no tensor for its threshold
        u = x + step_size * (grad_2 - grad_1)
        return u.sign() * F.relu(u.abs() - step_size * lambd)
    return F.relu(x + (step_size * (grad_2 - grad_1) - step_size * lambd))
