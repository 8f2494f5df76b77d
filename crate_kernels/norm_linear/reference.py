"""What the linear step means, in the official order of operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for x [..., width] after its LayerNorm."""
    return F.linear(x, weight, bias)
