"""PyTorch operators of shared-QKV attention: schemas, shapes, FLOP counts. Imports torch only.

``implementation`` is an argument, so that a traced graph says which one runs and the backward takes the forward's. ``kept``
is what its backward needs besides w and out: from ``triton`` the log-sum-exp of each row of scores, [batch, heads, tokens],
float32; from ``composed`` what ``composed_keeps`` says. ``keep`` is false where no backward will come. With ``return_lse``
kept is the log-sum-exp in any case. ``seed`` is an int64 tensor of one element on the CPU, not a number: it is drawn
inside graphs too, where a number would be frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels import dispatch
from crate_kernels.precision import arithmetic_dtype, undisturbed

torch.library.define(
    "crate_kernels::shared_attention_forward",
    "(Tensor w, float scale, bool is_causal, bool keep, str implementation, Tensor? lengths=None, float dropout=0.0, "
    "Tensor? seed=None, bool return_lse=False) -> (Tensor out, Tensor kept)",
)
torch.library.define(
    "crate_kernels::shared_attention_backward",
    "(Tensor grad_out, Tensor w, Tensor out, Tensor kept, float scale, bool is_causal, str implementation, "
    "Tensor? lengths=None, float dropout=0.0, Tensor? seed=None) -> Tensor",
)


def empty_token_major(w: Tensor) -> Tensor:
    """An uninitialised tensor like ``w`` [batch, heads, tokens, head_dim] whose memory runs [batch, tokens, heads, head_dim].

    The heads of one token stand side by side, so that the output projection reads [batch, tokens, width] without a copy.
    """
    batch, heads, tokens, head_dim = w.shape
    return w.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


# Tokens from which PyTorch's CPU flash attention is faster than batched products, and up to which those keep probabilities.
_LONG, _SHORT = 257, 512


def takes_flash_attention(w: Tensor, dropout: float) -> bool:
    """Whether ``composed`` is PyTorch's CPU flash attention: long sequences in float32 or float64, without dropout."""
    wide = arithmetic_dtype(w) in (torch.float32, torch.float64)
    return w.device.type == "cpu" and wide and dropout == 0 and w.shape[2] >= _LONG


def composed_keeps(w: Tensor, dropout: float = 0.0, return_lse: bool = False) -> str:
    """What ``composed`` keeps of w [batch, heads, tokens, head_dim] for its backward.

    "log-sum-exp": [batch, heads, tokens] in float32, or float64 for float64, from flash attention and wherever it is asked for.
    "probabilities": [batch, heads, tokens, tokens], before dropout and in w's dtype, of short sequences elsewhere on a CPU:
    they save one of six products and a softmax, and take tokens / head_dim times the memory of w.
    """
    if return_lse or takes_flash_attention(w, dropout):
        return "log-sum-exp"
    return "probabilities" if w.device.type == "cpu" and w.shape[2] <= _SHORT else "nothing"


@torch.library.impl("crate_kernels::shared_attention_forward", "CompositeExplicitAutograd")
@undisturbed
def _forward(
    w: Tensor,
    scale: float,
    is_causal: bool,
    keep: bool,
    implementation: str,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    kernels = dispatch.load("shared_attention", implementation)
    return kernels.forward(w, scale, is_causal, keep, lengths, dropout, seed, return_lse)


@torch.library.impl("crate_kernels::shared_attention_backward", "CompositeExplicitAutograd")
@undisturbed
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


@torch.library.register_fake("crate_kernels::shared_attention_forward")
def _forward_fake(
    w: Tensor,
    scale: float,
    is_causal: bool,
    keep: bool,
    implementation: str,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = w.shape
    keeps = "log-sum-exp" if implementation == "triton" else composed_keeps(w, dropout, return_lse)
    if keeps == "log-sum-exp":
        dtype = torch.float32 if implementation == "triton" else torch.promote_types(w.dtype, torch.float32)
        kept = w.new_empty(batch, heads, tokens, dtype=dtype)
    else:
        shape = (batch, heads, tokens, tokens) if keeps == "probabilities" and keep else (0,)
        kept = w.new_empty(shape)
    return empty_token_major(w), kept


@torch.library.register_fake("crate_kernels::shared_attention_backward")
def _backward_fake(grad_out: Tensor, w: Tensor, *_: Any, **__: Any) -> Tensor:
    return empty_token_major(w)


def _product_flops(w_shape: tuple[int, ...], is_causal: bool) -> int:
    """FLOPs of one tokens x tokens x head_dim product for every head."""
    batch, heads, tokens, head_dim = w_shape
    return 2 * batch * heads * tokens * tokens * head_dim // (2 if is_causal else 1)


@register_flop_formula(torch.ops.crate_kernels.shared_attention_forward)
def _forward_flops(w_shape: tuple[int, ...], scale: float, is_causal: bool, *_: Any, **__: Any) -> int:
    return 2 * _product_flops(w_shape, is_causal)


@register_flop_formula(torch.ops.crate_kernels.shared_attention_backward)
def _backward_flops(
    grad_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    out: Any,
    kept: Any,
    scale: float,
    is_causal: bool,
    *_: Any,
    **__: Any,
) -> int:
    return 5 * _product_flops(w_shape, is_causal)
