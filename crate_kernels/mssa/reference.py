"""What MSSA means, in the official order of operations."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from crate_kernels.shared_attention.mask import Mask
from crate_kernels.shared_attention.reference import shared_qkv_attention


def mssa(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | Tensor,
    mask: Mask,
    dropout: float,
) -> Tensor:
    w = rearrange(F.linear(x, qkv_weight), "b n (h d) -> b h n d", h=num_heads)
    out = rearrange(shared_qkv_attention(w, scale, mask, dropout), "b h n d -> b n (h d)")
    return out if out_weight is None else F.dropout(F.linear(out, out_weight, out_bias), dropout)
