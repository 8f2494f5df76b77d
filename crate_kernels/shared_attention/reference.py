"""What shared-QKV attention means, in the official order of operations."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_qkv_attention(w: Tensor, scale: float, is_causal: bool) -> Tensor:
    scores = torch.matmul(w, w.transpose(-1, -2)) * scale
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=w.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1), w)
