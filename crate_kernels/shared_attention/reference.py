"""What shared-QKV attention means, in the official order of operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_kernels.shared_attention.mask import NO_MASK, Mask


def shared_qkv_attention(
    w: Tensor, scale: float | Tensor, mask: Mask = NO_MASK, dropout: float = 0.0, seed: int | None = None
) -> Tensor:
    w, idle = mask.without_padding(w), mask.idle(w)
    out = torch.matmul(drop(masked_scores(w, scale, mask).softmax(dim=-1), dropout, seed), w)
    return out if idle is None else out.masked_fill(idle[..., None], 0.0)


def log_sum_exp(w: Tensor, scale: float | Tensor, mask: Mask = NO_MASK) -> Tensor:
    """The log-sum-exp of each row of scores [batch, heads, tokens], a constant to autograd."""
    w, idle = mask.without_padding(w.detach()), mask.idle(w)
    scores = masked_scores(w, scale.detach() if isinstance(scale, Tensor) else scale, mask)
    lse = scores.to(torch.promote_types(w.dtype, torch.float32)).logsumexp(-1)
    return lse if idle is None else lse.masked_fill(idle, float("-inf"))


def masked_scores(w: Tensor, scale: float | Tensor, mask: Mask) -> Tensor:
    """scale * w w^T, and -inf for keys that a token must not see; ``scale`` may be one number for each head."""
    scores = torch.matmul(w, w.transpose(-1, -2))
    return mask.hide(scores * (scale.to(scores.dtype)[:, None, None] if isinstance(scale, Tensor) else scale), w)


def drop(probabilities: Tensor, dropout: float, seed: int | None) -> Tensor:
    if dropout == 0 or seed is None:
        return F.dropout(probabilities, dropout)
    generator = torch.Generator(probabilities.device).manual_seed(seed)
    kept = torch.rand(probabilities.shape, device=probabilities.device, generator=generator) >= dropout
    return probabilities * kept / (1 - dropout)
