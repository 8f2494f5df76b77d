"""PyTorch operators of shared-QKV attention: schemas, shapes, FLOP counts. Imports no Triton.

``implementation`` is an argument, so that a traced graph says which one runs, and the backward takes the same as the forward.
``kept`` is what the backward needs besides w and out: with ``triton`` the log-sum-exp of each row of scores, [batch, heads,
tokens], float32; with ``composed`` what ``composed_keeps`` says, and always the log-sum-exp if ``return_lse`` is set. ``keep`` is
false where no backward will come. ``seed`` is an int64 tensor of one element on the CPU, and not a number, which would be a
constant in a compiled graph. ``scales`` [heads], in float32 at least, stands for ``scale`` where each head has its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels import dispatch
from crate_kernels.cpu import arithmetic_dtype
from crate_kernels.definitions import register
from crate_kernels.private_torch import HAS_CPU_FLASH_ATTENTION
from crate_kernels.shared_attention.mask import Mask


class AttentionArguments(NamedTuple):
    """What both operators take last, in the order of their schemas."""

    scale: float
    keep: bool
    implementation: str
    dropout: float = 0.0
    seed: Tensor | None = None
    return_lse: bool = False
    scales: Tensor | None = None
    is_causal: bool = False  # from here on as in Mask
    window: int | None = None
    lengths: Tensor | None = None
    spans: Tensor | None = None
    key_mask: Tensor | None = None

    @property
    def mask(self) -> Mask:
        return Mask(self.is_causal, self.window, self.lengths, self.spans, self.key_mask)


def empty_token_major(w: Tensor) -> Tensor:
    """An uninitialised tensor like ``w`` [batch, heads, tokens, head_dim] whose memory runs [batch, tokens, heads, head_dim].

    The heads of one token are adjacent, so that the output projection reads [batch, tokens, width] without a copy.
    """
    batch, heads, tokens, head_dim = w.shape
    return w.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


# From _LONG tokens on, PyTorch's CPU flash attention is faster than batched products. Those keep probabilities up to _SHORT.
_LONG, _SHORT = 257, 512


def takes_flash_attention(w: Tensor, given: AttentionArguments) -> bool:
    """Whether ``composed`` calls PyTorch's CPU flash attention: for long sequences in float32 or float64, without dropout, and
    without what would need a number for each pair of tokens."""
    wide = arithmetic_dtype(w) in (torch.float32, torch.float64)
    suits = wide and given.dropout == 0 and given.scales is None and given.mask.is_plain
    return HAS_CPU_FLASH_ATTENTION and w.device.type == "cpu" and suits and w.shape[2] >= _LONG


def composed_keeps(w: Tensor, given: AttentionArguments) -> str:
    """What ``composed`` keeps of w [batch, heads, tokens, head_dim] for its backward.

    "log-sum-exp": [batch, heads, tokens] in float32, or float64 for float64; with flash attention, and where it is asked for.
    "probabilities": [batch, heads, tokens, tokens], before dropout and in w's dtype; else for short sequences on a CPU. They save
    the backward a softmax and one of six products, and take tokens / head_dim times the memory of w.
    "nothing": otherwise.
    """
    if given.return_lse or takes_flash_attention(w, given):
        return "log-sum-exp"
    return "probabilities" if w.device.type == "cpu" and w.shape[2] <= _SHORT else "nothing"


def _forward(w: Tensor, given: AttentionArguments) -> tuple[Tensor, Tensor]:
    return dispatch.load("shared_attention", given.implementation).forward(w, given)


def _backward(
    grad_out: Tensor,
    w: Tensor,
    out: Tensor,
    kept: Tensor,
    need_scales: bool,
    given: AttentionArguments,
) -> tuple[Tensor, Tensor]:
    """The gradients of w and, if ``need_scales``, of the scales; else empty."""
    return dispatch.load("shared_attention", given.implementation).backward(grad_out, w, out, kept, need_scales, given)


def _forward_fake(w: Tensor, given: AttentionArguments) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = w.shape
    is_triton = given.implementation == "triton"
    keeps = "log-sum-exp" if is_triton else composed_keeps(w, given)
    if keeps == "log-sum-exp":
        dtype = torch.float32 if is_triton else torch.promote_types(w.dtype, torch.float32)
        kept = w.new_empty(batch, heads, tokens, dtype=dtype)
    else:
        kept = w.new_empty((batch, heads, tokens, tokens) if keeps == "probabilities" and given.keep else 0)
    return empty_token_major(w), kept


def _backward_fake(
    grad_out: Tensor, w: Tensor, out: Tensor, kept: Tensor, need_scales: bool, given: AttentionArguments
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(w.dtype, torch.float32)
    return empty_token_major(w), w.new_empty(w.shape[1] if need_scales else 0, dtype=dtype)


def product(w_shape: tuple[int, ...], is_causal: bool, window: int | None) -> int:
    """FLOPs of one tokens x tokens x head_dim product for every head: of the pairs that a window leaves, and of half of them all
    under a causal mask alone. What tensors of a mask hide is not known without reading them."""
    batch, heads, tokens, head_dim = w_shape
    pairs = tokens * tokens // (2 if is_causal else 1)
    if window is not None:
        near = min(window + 1, tokens)
        before = near * (near + 1) // 2 + (tokens - near) * near  # pairs of a token with itself or an earlier one
        pairs = before if is_causal else 2 * before - tokens
    return 2 * batch * heads * pairs * head_dim


register(
    "shared_attention_forward",
    _forward,
    fake=_forward_fake,
    flops=lambda w, given: 2 * product(w, given.is_causal, given.window),
    replayed=True,
)
register(
    "shared_attention_backward",
    _backward,
    fake=_backward_fake,
    flops=lambda grad, w, out, kept, need_scales, given: 5 * product(w, given.is_causal, given.window),
    replayed=True,
)
