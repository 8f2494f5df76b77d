"""MSSA in standard PyTorch calls around the shared-QKV attention operator, which keeps the scores out of memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from crate_kernels.library_products import linear
from crate_kernels.shared_attention.api import unchecked_attention
from crate_kernels.shared_attention.mask import Mask


def mssa(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | Tensor,
    mask: Mask,
    dropout: float,
    attention: str,
) -> Tensor:
    """MSSA of x [batch, tokens, width]; ``attention`` names the implementation of the attention between the projections."""
    w = linear(x, qkv_weight).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    out = unchecked_attention(w, scale, mask, dropout, attention).transpose(1, 2).flatten(2)
    return out if out_weight is None else F.dropout(linear(out, out_weight, out_bias), dropout)
