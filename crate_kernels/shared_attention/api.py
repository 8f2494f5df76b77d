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
from crate_kernels.shared_attention.mask import Mask, checked_mask

WIDEST_HEAD = 128


@overload
def shared_qkv_attention(
    w: Tensor, *, scale: float | Tensor | None = None, is_causal: bool = False, window: int | None = None,
    lengths: Tensor | None = None, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, dropout: float = 0.0,
    seed: int | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def shared_qkv_attention(
    w: Tensor, *, scale: float | Tensor | None = None, is_causal: bool = False, window: int | None = None,
    lengths: Tensor | None = None, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, dropout: float = 0.0,
    seed: int | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def shared_qkv_attention(
    w: Tensor, *, scale: float | Tensor | None = None, is_causal: bool = False, window: int | None = None,
    lengths: Tensor | None = None, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, dropout: float = 0.0,
    seed: int | None = None, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def shared_qkv_attention(
    w: Tensor,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose query, key and value are one tensor: ``softmax(scale * w w^T) w`` for every head.

    Args:
        w: [batch, heads, tokens, head_dim], float32, float16 or bfloat16 (float64 off the Triton path), of any strides: a
            transposed view of [batch, tokens, heads * head_dim] costs no copy. Under autocast it is cast to the autocast dtype.
        scale: factor on the scores, above zero; head_dim**-0.5 if None. A floating-point tensor [heads] on w's device gives each
            head its own, and gets a gradient if it wants one. Its values are checked where those of lengths are.
        is_causal: token i attends to tokens 0..i only.
        window: token i attends to tokens i - window..i + window only, or to i - window..i if causal.
        lengths: [batch], int32 or int64, on w's device: in sample b, tokens from ``lengths[b]`` on are padding. Padding is no
            key, its rows of the output are zero, it gets no gradient, and what is stored there is not used. Each length is at
            least 1 and at most tokens. That is checked for CPU tensors outside ``torch.compile``; elsewhere the check would
            wait for the device, and lengths act as if clamped to 0..tokens.
        key_mask: [batch, tokens], bool, on w's device: only tokens with True are attended to. The others attend as all do. A
            token for which no key is left has zero in the output and -inf as its log-sum-exp.
        cu_seqlens: [sequences + 1], int32 or int64, on w's device: sequences packed one after another into a batch of 1.
            Sequence s is tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, and tokens attend within their sequence only. The
            first number is 0, the last at most tokens; tokens behind the last sequence are padding, as with lengths. Checked
            where lengths are.
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

    Options go together, but for lengths and cu_seqlens: a token attends to those that all of them allow. A token that is not
    finite may spread to tokens that do not attend to it, as it does where PyTorch masks scores; padding does not.

    Kernels walk the tiles of tokens that a window, a causal mask or a sequence leaves, so their time is that of what is left.
    Elsewhere all scores are computed, and masked.

    The backward runs the implementation of the forward, and is deterministic. It keeps w, the output and one number for each row
    of scores. On a CPU it keeps the probabilities instead, up to 256 tokens, or 512 with dropout or where it multiplies in 16
    bits. Kernels refuse second and higher derivatives, and so does the composed path with dropout; without dropout it has them,
    by autograd of the formula.

    Raises:
        TypeError: w is not a floating-point tensor, lengths or cu_seqlens not one of int32 or int64, key_mask not one of bool,
            scale or dropout not a number, or window or seed not an int.
        ValueError: w has not four dimensions, has no tokens or features, scale is not above zero, shapes do not fit, lengths and
            cu_seqlens are both given, or window, lengths, cu_seqlens, dropout or seed are out of range.
        RuntimeError: a forced implementation cannot run on w.

    Source: CRATE (arXiv 2306.01129), section 2.3; CRATE-MAE (arXiv 2404.02446), section 3. Dropout as in the official modules.
    """
    validation.tensor("w", w, "batch heads tokens head_dim")
    if w.shape[2] == 0 or w.shape[3] == 0:
        raise ValueError(f"w: expected at least one token and one feature a head, got {validation.describe(w)}")
    factor = checked_scale(scale, w.shape[1], w.shape[3], w)
    mask = checked_mask(w, 2, is_causal, window, lengths, key_mask, cu_seqlens)
    check_dropout(dropout, seed)

    dtype = compute_dtype(w)
    implementation = dispatch.choose("shared_qkv_attention", w, dtype, obstacle_to_triton(w.shape[-1]))
    if implementation == "reference":
        out = reference.shared_qkv_attention(w, factor, mask, dropout, seed)
        return (out, reference.log_sum_exp(w, factor, mask)) if return_lse else out
    return _attend(w.to(dtype), factor, mask, float(dropout), _key(dropout, seed), implementation, return_lse)


def checked_scale(scale: float | Tensor | None, heads: int, head_dim: int, x: Tensor) -> float | Tensor:
    """The factor on the scores: a number, or a tensor [heads] as it was given, on the device of ``x``."""
    expected = f"a number or a floating-point tensor [heads] ({heads},) on {x.device}"
    scale = head_dim**-0.5 if scale is None else scale
    if not isinstance(scale, (int, float, Tensor)) or (isinstance(scale, Tensor) and not scale.is_floating_point()):
        raise TypeError(f"scale: expected {expected}, got {validation.describe(scale)}")
    if not isinstance(scale, Tensor):
        validation.number("scale", scale, positive=True)
        return float(scale)
    if scale.shape != (heads,) or scale.device != x.device:
        raise ValueError(f"scale: expected {expected}, got {validation.describe(scale)}")
    if validation.shows_values(scale):
        values = scale.detach().to(_dtype_of_scale(x))
        if not ((values > 0) & values.isfinite()).all():
            raise ValueError(f"scale: expected finite {values.dtype} numbers above zero, got {scale.tolist()}")
    return scale


def _dtype_of_scale(x: Tensor) -> torch.dtype:
    """What a scale for each head is computed in: float32, or float64 beside float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_dropout(dropout: float, seed: int | None) -> None:
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


def unchecked_attention(w: Tensor, scale: float | Tensor, mask: Mask, dropout: float, implementation: str) -> Tensor:
    """``shared_qkv_attention`` without its checks, for an operator that has made them already and chosen an implementation."""
    out = _attend(w, scale, mask, dropout, _key(dropout, None), implementation, False)
    assert isinstance(out, Tensor)
    return out


def _attend(
    w: Tensor,
    scale: float | Tensor,
    mask: Mask,
    dropout: float,
    key: Tensor | None,
    implementation: str,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    number, scales = (1.0, scale.to(_dtype_of_scale(w)).contiguous()) if isinstance(scale, Tensor) else (scale, None)
    keep = torch.is_grad_enabled() and w.requires_grad
    given = op.AttentionArguments(number, keep, implementation, dropout, key, return_lse, scales)._replace(
        **mask._asdict()
    )
    return _SharedAttention.apply(w, *given)


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
    return reference.shared_qkv_attention(wide, given.scale if given.scales is None else given.scales, given.mask)


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
        want_w, *want_fields = ctx.needs_input_grad
        want = op.AttentionArguments(*want_fields)
        grad_w, grad_scales = ops.shared_attention_backward(grad_out, *tensors, want.scales, *given)
        grads = [grad_scales if name == "scales" and want.scales else None for name in given._fields]
        return grad_w if want_w else None, *grads
