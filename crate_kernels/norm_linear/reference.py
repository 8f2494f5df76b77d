"""What the linear step means, in the official order of operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of x [..., width] as its LayerNorm left it."""
    return F.linear(x, weight, bias)
