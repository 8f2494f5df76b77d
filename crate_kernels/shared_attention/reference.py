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
) -> Tensor:
    w, padding = without_padding(w, lengths)
    out = torch.matmul(drop(masked_scores(w, scale, is_causal, padding).softmax(dim=-1), dropout, seed), w)
    return out if padding is None else out.masked_fill(padding[..., None], 0.0)


def log_sum_exp(w: Tensor, scale: float, is_causal: bool, lengths: Tensor | None = None) -> Tensor:
    """The log-sum-exp of each row of scores [batch, heads, tokens], a constant to autograd."""
    w, padding = without_padding(w.detach(), lengths)
    scores = masked_scores(w, scale, is_causal, padding)
    lse = scores.to(torch.promote_types(w.dtype, torch.float32)).logsumexp(-1)
    return lse if padding is None else lse.masked_fill(padding, float("-inf"))


def without_padding(w: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """w with zeros for padding, and where that is: True in [batch, 1, tokens]; None without lengths."""
    if lengths is None:
        return w, None
    padding = (torch.arange(w.shape[2], device=w.device) >= lengths[:, None])[:, None]
    return w.masked_fill(padding[..., None], 0.0), padding


def masked_scores(w: Tensor, scale: float, is_causal: bool, padding: Tensor | None) -> Tensor:
    """scale * w w^T, and -inf for keys that a token must not see."""
    scores = torch.matmul(w, w.transpose(-1, -2)) * scale
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=w.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores if padding is None else scores.masked_fill(padding[:, :, None], float("-inf"))


def drop(probabilities: Tensor, dropout: float, seed: int | None) -> Tensor:
    if dropout == 0 or seed is None:
        return F.dropout(probabilities, dropout)
    generator = torch.Generator(probabilities.device).manual_seed(seed)
    kept = torch.rand(probabilities.shape, device=probabilities.device, generator=generator) >= dropout
    return probabilities * kept / (1 - dropout)
