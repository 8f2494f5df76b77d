"""The public function, and the autograd boundary around the operators."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from crate_kernels import dispatch, validation
from crate_kernels._ops import ops
from crate_kernels.autograd import Formula, derivative, save, saved
from crate_kernels.dtypes import compute_dtype
from crate_kernels.shared_attention import op, reference

WIDEST_HEAD = 128


@overload
def shared_qkv_attention(
    w: Tensor, *, scale: float | None = None, is_causal: bool = False, lengths: Tensor | None = None,
    dropout: float = 0.0, seed: int | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def shared_qkv_attention(
    w: Tensor, *, scale: float | None = None, is_causal: bool = False, lengths: Tensor | None = None,
    dropout: float = 0.0, seed: int | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def shared_qkv_attention(
    w: Tensor, *, scale: float | None = None, is_causal: bool = False, lengths: Tensor | None = None,
    dropout: float = 0.0, seed: int | None = None, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def shared_qkv_attention(
    w: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose query, key and value are one tensor: ``softmax(scale * w w^T) w`` for every head.

    Args:
        w: [batch, heads, tokens, head_dim], float32, float16 or bfloat16 (float64 off the Triton path), of any strides: a
            transposed view of [batch, tokens, heads * head_dim] costs no copy. Under autocast it is cast to the autocast dtype.
        scale: factor on the scores; head_dim**-0.5 if None.
        is_causal: token i attends to tokens 0..i only.
        lengths: [batch], int32 or int64, on w's device: in sample b, tokens from ``lengths[b]`` on are padding. Padding is no
            key, its rows of the output are zero, it gets no gradient, and what is stored there is not used. Each length is at
            least 1 and at most tokens. That is checked for CPU tensors outside ``torch.compile``; elsewhere the check would
            wait for the device, and lengths act as if clamped to 0..tokens.
        dropout: probability, below 1, with which each weight of the softmax is set to zero, independently; the others are
            divided by ``1 - dropout``. There is no training flag: pass 0 for evaluation.
        seed: determines which weights are dropped, 0 <= seed < 2**63. If None it is drawn from PyTorch's default CPU generator,
            so that ``torch.manual_seed`` reproduces it. Each implementation makes another mask of the same seed, and the
            composed one makes another on each kind of device. A CUDA graph replays one mask.
        return_lse: return the log-sum-exp too.

    Returns:
        out: [batch, heads, tokens, head_dim] in w's dtype (the autocast dtype under autocast), laid out in memory as
            [batch, tokens, heads, head_dim], so that ``out.transpose(1, 2).flatten(2)`` is a view.
        lse: only with ``return_lse``: [batch, heads, tokens], float32 (float64 for float64), the natural logarithm of each row's
            sum of exponentials, before dropout; -inf for padding. No gradient flows through it.

    The backward runs the implementation of the forward, and is deterministic. It keeps w, the output and one number for each row
    of scores. On a CPU it keeps the probabilities instead, up to 256 tokens, or 512 with dropout or where it multiplies in 16
    bits. Kernels refuse second and higher derivatives, and so does the composed path with dropout; without dropout it has them,
    by autograd of the formula.

    Raises:
        TypeError: w is not a floating-point tensor, lengths not one of int32 or int64, scale or dropout not a number, or seed
            not an int.
        ValueError: w has not four dimensions, has no tokens or features, scale is not above zero, or lengths, dropout or seed
            are out of range.
        RuntimeError: a forced implementation cannot run on w.

    Source: CRATE (arXiv 2306.01129), section 2.3; CRATE-MAE (arXiv 2404.02446), section 3. Dropout as in the official modules.
    """
    validation.tensor("w", w, "batch heads tokens head_dim")
    if w.shape[2] == 0 or w.shape[3] == 0:
        raise ValueError(f"w: expected at least one token and one feature a head, got {validation.describe(w)}")
    if scale is None:
        scale = w.shape[-1] ** -0.5
    validation.number("scale", scale, positive=True)
    check_padding_and_dropout(w, 2, lengths, dropout, seed)

    dtype = compute_dtype(w)
    implementation = dispatch.choose("shared_qkv_attention", w, dtype, obstacle_to_triton(w.shape[-1]))
    if implementation == "reference":
        out = reference.shared_qkv_attention(w, scale, is_causal, lengths, dropout, seed)
        return (out, reference.log_sum_exp(w, scale, is_causal, lengths)) if return_lse else out
    w = w.to(dtype)
    settings = float(scale), is_causal, _keeps(w), implementation, lengths, float(dropout), _key(dropout, seed)
    return _SharedAttention.apply(w, *settings, return_lse)


def check_padding_and_dropout(
    x: Tensor, tokens_dim: int, lengths: Tensor | None, dropout: float, seed: int | None
) -> None:
    """Checks ``lengths``, ``dropout`` and ``seed`` for ``x``, whose dimension ``tokens_dim`` is the tokens."""
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths: expected an int32 or int64 tensor [batch], got {validation.describe(lengths)}")
        if lengths.shape != x.shape[:1]:
            raise ValueError(f"lengths: expected [batch] {tuple(x.shape[:1])}, got {validation.describe(lengths)}")
        if lengths.device != x.device:
            raise ValueError(f"lengths: expected it on {x.device} like its tokens, got {validation.describe(lengths)}")
        if validation.shows_values(lengths):
            outside = lengths[(lengths < 1) | (lengths > x.shape[tokens_dim])]
            if len(outside):
                raise ValueError(f"lengths: expected 1 to {x.shape[tokens_dim]} tokens, got {outside[0].item()}")
    validation.number("dropout", dropout)
    if dropout >= 1:
        raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
    if seed is not None and not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {validation.describe(seed)}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected at least 0 and less than 2**63, got {seed}")


def obstacle_to_triton(head_dim: int) -> str | None:
    """Why kernels cannot take heads of this width, in words; None where they can."""
    # Rows of w are held in registers, and wider ones do not fit.
    return f"its kernels take heads of 1 to {WIDEST_HEAD} features, not {head_dim}" if head_dim > WIDEST_HEAD else None


def unchecked_attention(
    w: Tensor,
    scale: float,
    is_causal: bool,
    implementation: str,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``shared_qkv_attention`` without its checks, for an operator that has made them already and chosen an implementation."""
    settings = scale, is_causal, _keeps(w), implementation, lengths, dropout, _key(dropout, None)
    return _SharedAttention.apply(w, *settings, False)


def _keeps(w: Tensor) -> bool:
    """Whether a backward may come."""
    return torch.is_grad_enabled() and w.requires_grad


def _key(dropout: float, seed: int | None) -> Tensor | None:
    """The seed as operators take it (``op`` says why), drawn now where none is given; None without dropout."""
    if not dropout:
        return None
    return torch.randint(2**63 - 1, (1,), device="cpu") if seed is None else torch.tensor([seed], device="cpu")


def _formula_of(ctx: Any) -> Formula | None:
    if ctx.given.implementation == "triton":
        return None
    if ctx.given.dropout:
        raise RuntimeError(
            "shared_qkv_attention: dropout, drawn part by part, has no second derivative and no batched gradients; run the "
            'forward under crate_kernels.use("reference"), or without dropout'
        )
    return _formula


def _formula(w: Tensor, given: op.AttentionArguments) -> Tensor:
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    return reference.shared_qkv_attention(wide, given.scale, given.is_causal, given.lengths)


class _SharedAttention(torch.autograd.Function):
    """Arguments: w, and ``op.AttentionArguments``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        out, kept = ops.shared_attention_forward(w, *arguments)
        given = op.AttentionArguments(*arguments)
        save(ctx, given, w, out, kept)
        if not given.return_lse:
            return out
        ctx.mark_non_differentiable(kept)
        return out, kept

    @staticmethod
    @derivative("shared_qkv_attention", _formula_of)
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        given, tensors = saved(ctx)
        scale, is_causal, _, implementation, lengths, dropout, seed, _ = given
        settings = scale, is_causal, implementation, lengths, dropout, seed
        grad_w = ops.shared_attention_backward(grad_out, *tensors, *settings)
        return grad_w, *[None] * len(given)
