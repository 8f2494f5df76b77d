"""The linear step in standard PyTorch calls: the library's LayerNorm, then its product in the arithmetic that is fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_kernels.library_products import linear


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Of x [..., width] as its LayerNorm left it; operands and result in ``dtype``."""
    return linear(x.to(dtype), weight, bias)
