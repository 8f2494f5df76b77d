"""What shared-QKV attention means, in the official order of operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shared_qkv_attention(
    w: Tensor,
    scale: float,
    is_causal: bool,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if lengths is not None:
        padding = torch.arange(w.shape[2], device=w.device) >= lengths[:, None]  # [batch, tokens]
        w = w.masked_fill(padding[:, None, :, None], 0.0)
    scores = torch.matmul(w, w.transpose(-1, -2)) * scale
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=w.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    if lengths is not None:
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
    out = torch.matmul(drop(scores.softmax(dim=-1), dropout, seed), w)
    if lengths is not None:
        out = out.masked_fill(padding[:, None, :, None], 0.0)
    if not return_lse:
        return out
    lse = scores.detach().to(torch.promote_types(w.dtype, torch.float32)).logsumexp(-1)
    return out, lse if lengths is None else lse.masked_fill(padding[:, None, :], float("-inf"))


def drop(probabilities: Tensor, dropout: float, seed: int | None) -> Tensor:
    if dropout == 0 or seed is None:
        return F.dropout(probabilities, dropout)
    generator = torch.Generator(probabilities.device).manual_seed(seed)
    kept = torch.rand(probabilities.shape, device=probabilities.device, generator=generator) >= dropout
    return probabilities * kept / (1 - dropout)
