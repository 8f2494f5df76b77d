"""The public function, and the autograd boundary around the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_kernels import checks, dispatch
from crate_kernels.precision import compute_dtype
from crate_kernels.shared_attention import op, reference  # noqa: F401  (op registers the operators)

WIDEST_HEAD = 128


def shared_qkv_attention(w: Tensor, *, scale: float | None = None, is_causal: bool = False) -> Tensor:
    """Attention whose query, key and value are one tensor: ``softmax(scale * w w^T) w`` for every head.

    Args:
        w: [batch, heads, tokens, head_dim], float32, float16 or bfloat16 (float64 off the Triton path), of any strides: a
            transposed view of [batch, tokens, heads * head_dim] costs no copy. Under autocast it is cast to the autocast dtype.
        scale: factor on the scores; head_dim**-0.5 if None.
        is_causal: token i attends to tokens 0..i only.

    Returns:
        [batch, heads, tokens, head_dim] in w's dtype (the autocast dtype under autocast), laid out in memory as
        [batch, tokens, heads, head_dim], so that ``out.transpose(1, 2).flatten(2)`` is a view.

    The backward takes the forward's implementation. It is deterministic, and cannot be differentiated again. Kept for it
    are w, the output and one number a row (on a CPU that multiplies in 16 bits, for up to 512 tokens, the probabilities instead).

    Raises:
        TypeError: w is not a floating-point tensor, or scale not a number.
        ValueError: w has not four dimensions, has no tokens or features, or scale is not above zero.
        RuntimeError: a forced implementation cannot run on w.

    Source: CRATE (arXiv 2306.01129), section 2.3; CRATE-MAE (arXiv 2404.02446), section 3.
    """
    checks.tensor("w", w, "batch heads tokens head_dim")
    if w.shape[2] == 0 or w.shape[3] == 0:
        raise ValueError(f"w: expected at least one token and one feature a head, got {checks.describe(w)}")
    if scale is None:
        scale = w.shape[-1] ** -0.5
    checks.number("scale", scale, positive=True)

    dtype = compute_dtype(w)
    implementation = dispatch.choose(w, dtype, obstacle_to_triton(w.shape[-1]))
    if implementation == "reference":
        return reference.shared_qkv_attention(w, scale, is_causal)
    return attend(w.to(dtype), float(scale), is_causal, implementation)


def obstacle_to_triton(head_dim: int) -> str | None:
    """What about the width of a head keeps the kernels from running, in words."""
    # Rows of w stay in registers; beyond this width no tile fits.
    return f"its kernels take heads of 1 to {WIDEST_HEAD} features, not {head_dim}" if head_dim > WIDEST_HEAD else None


def attend(w: Tensor, scale: float, is_causal: bool, implementation: str) -> Tensor:
    """``shared_qkv_attention`` behind its checks and choices, for an operator that has made them already."""
    keep = torch.is_grad_enabled() and w.requires_grad
    return _SharedAttention.apply(w, scale, is_causal, keep, implementation)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: float, is_causal: bool, keep: bool, implementation: str) -> Tensor:
        out, kept = torch.ops.crate_kernels.shared_attention_forward(w, scale, is_causal, keep, implementation)
        ctx.save_for_backward(w, out, kept)
        ctx.arguments = scale, is_causal, implementation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_w = torch.ops.crate_kernels.shared_attention_backward(grad_out, *ctx.saved_tensors, *ctx.arguments)
        return grad_w, None, None, None, None
