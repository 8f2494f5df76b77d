"""What the overcomplete step means, in the official order of operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def overcomplete_ista(
    x: Tensor,
    dictionary: Tensor,
    out_dictionary: Tensor | None,
    step_size: float | Tensor,
    lambd: float | Tensor,
) -> Tensor:
    negative_gradient = F.linear(x, dictionary.t())
    z1 = F.relu(step_size * negative_gradient - step_size * lambd)
    gradient = F.linear(F.linear(z1, dictionary) - x, dictionary.t())
    z2 = F.relu(z1 - step_size * gradient - step_size * lambd)
    return F.linear(z2, dictionary if out_dictionary is None else out_dictionary)
