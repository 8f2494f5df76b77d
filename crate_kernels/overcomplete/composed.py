"""The overcomplete step in standard PyTorch calls: four large products, two of them with eta * D.

Fewer products would cost more: z1 (D^T D) replaces two products by one that is codes / width times as large as either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crate_kernels.library_products import linear


def overcomplete_ista(
    x: Tensor,
    dictionary: Tensor,
    out_dictionary: Tensor | None,
    step_size: Tensor,
    lambd: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The step for x [..., width] after its LayerNorm, in any dtype; operands, codes and result are in ``dtype``."""
    descent, threshold = (step_size * dictionary).t(), step_size * lambd
    z1 = (linear(x.to(dtype), descent) - threshold).relu()
    residual = (x - linear(z1, dictionary)).to(dtype)
    z2 = (z1 + linear(residual, descent) - threshold).relu()
    return linear(z2, dictionary if out_dictionary is None else out_dictionary)
