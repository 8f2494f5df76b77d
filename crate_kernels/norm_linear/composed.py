"""The linear step in standard PyTorch calls: a product by the library and in the dtype that are fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_kernels.library_products import linear


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x W^T + b`` for x [..., width] after its LayerNorm; operands and result are in ``dtype``."""
    return linear(x.to(dtype), weight, bias)
