"""PyTorch operators of shared-QKV attention: schemas, shapes, FLOP counts. Imports no Triton.

``implementation`` is an argument, so that a traced graph says which one runs, and the backward takes the same as the forward.
``kept`` is what the backward needs besides w and out: with ``triton`` the log-sum-exp of each row of scores, [batch, heads,
tokens], float32; with ``composed`` what ``composed_keeps`` says, and always the log-sum-exp if ``return_lse`` is set. ``keep`` is
false where no backward will come. ``seed`` is an int64 tensor of one element on the CPU, and not a number, which would be a
constant in a compiled graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels import dispatch
from crate_kernels.cpu import arithmetic_dtype
from crate_kernels.definitions import register
from crate_kernels.private_torch import HAS_CPU_FLASH_ATTENTION


class AttentionArguments(NamedTuple):
    """What the forward takes after w, in the order of its schema."""

    scale: float
    is_causal: bool
    keep: bool
    implementation: str
    lengths: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    return_lse: bool = False


def empty_token_major(w: Tensor) -> Tensor:
    """An uninitialised tensor like ``w`` [batch, heads, tokens, head_dim] whose memory runs [batch, tokens, heads, head_dim].

    The heads of one token are adjacent, so that the output projection reads [batch, tokens, width] without a copy.
    """
    batch, heads, tokens, head_dim = w.shape
    return w.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


# From _LONG tokens on, PyTorch's CPU flash attention is faster than batched products. Those keep probabilities up to _SHORT.
_LONG, _SHORT = 257, 512


def takes_flash_attention(w: Tensor, dropout: float) -> bool:
    """Whether ``composed`` calls PyTorch's CPU flash attention: for long sequences in float32 or float64, without dropout."""
    wide = arithmetic_dtype(w) in (torch.float32, torch.float64)
    return HAS_CPU_FLASH_ATTENTION and w.device.type == "cpu" and wide and dropout == 0 and w.shape[2] >= _LONG


def composed_keeps(w: Tensor, dropout: float = 0.0, return_lse: bool = False) -> str:
    """What ``composed`` keeps of w [batch, heads, tokens, head_dim] for its backward.

    "log-sum-exp": [batch, heads, tokens] in float32, or float64 for float64; with flash attention, and where it is asked for.
    "probabilities": [batch, heads, tokens, tokens], before dropout and in w's dtype; else for short sequences on a CPU. They save
    the backward a softmax and one of six products, and take tokens / head_dim times the memory of w.
    "nothing": otherwise.
    """
    if return_lse or takes_flash_attention(w, dropout):
        return "log-sum-exp"
    return "probabilities" if w.device.type == "cpu" and w.shape[2] <= _SHORT else "nothing"


def _forward(w: Tensor, given: AttentionArguments) -> tuple[Tensor, Tensor]:
    scale, is_causal, keep, implementation, *options = given
    return dispatch.load("shared_attention", implementation).forward(w, scale, is_causal, keep, *options)


def _backward(
    grad_out: Tensor,
    w: Tensor,
    out: Tensor,
    kept: Tensor,
    scale: float,
    is_causal: bool,
    implementation: str,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    kernels = dispatch.load("shared_attention", implementation)
    return kernels.backward(grad_out, w, out, kept, scale, is_causal, lengths, dropout, seed)


def _forward_fake(w: Tensor, given: AttentionArguments) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = w.shape
    is_triton = given.implementation == "triton"
    keeps = "log-sum-exp" if is_triton else composed_keeps(w, given.dropout, given.return_lse)
    if keeps == "log-sum-exp":
        dtype = torch.float32 if is_triton else torch.promote_types(w.dtype, torch.float32)
        kept = w.new_empty(batch, heads, tokens, dtype=dtype)
    else:
        kept = w.new_empty((batch, heads, tokens, tokens) if keeps == "probabilities" and given.keep else 0)
    return empty_token_major(w), kept


def _product(w_shape: tuple[int, ...], is_causal: bool) -> int:
    """FLOPs of one tokens x tokens x head_dim product for every head."""
    batch, heads, tokens, head_dim = w_shape
    return 2 * batch * heads * tokens * tokens * head_dim // (2 if is_causal else 1)


register(
    "shared_attention_forward",
    _forward,
    fake=_forward_fake,
    flops=lambda w, given: 2 * _product(w, given.is_causal),
    replayed=True,
)
register(
    "shared_attention_backward",
    _backward,
    fake=lambda grad, w, *_: empty_token_major(w),
    flops=lambda grad, w, out, kept, scale, is_causal, *_: 5 * _product(w, is_causal),
    replayed=True,
)
