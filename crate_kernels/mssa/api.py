"""The public function, and the autograd boundary around the operators of the Triton path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_kernels import checks, dispatch
from crate_kernels.mssa import composed, op, reference  # noqa: F401  (op registers the operators)
from crate_kernels.precision import compute_dtype, is_autocast, layer_norm, no_autocast
from crate_kernels.shared_attention.api import check_padding_and_dropout, obstacle_to_triton


def mssa(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None = None,
    *,
    num_heads: int,
    scale: float | None = None,
    is_causal: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    residual: Tensor | None = None,
    subtract: bool = False,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head subspace self-attention: ``softmax(scale * w w^T) w W_out^T + b`` with ``w = x U^T`` split into heads.

    With a LayerNorm, x is normalised first. With a residual the result is ``residual + MSSA(x)``, or, with ``subtract``
    (the CRATE-MAE decoder), ``residual - MSSA(x)``.

    Args:
        x: [batch, tokens, width]; float32, float16 or bfloat16 (float64 off the Triton path), any strides.
        qkv_weight: U, [num_heads * head_dim, width], the one projection for query, key and value.
        out_weight: [out_width, num_heads * head_dim], or None where the official projection is the identity (one head as
            wide as the model).
        out_bias: [out_width], or None.
        num_heads: heads that share the rows of ``qkv_weight`` evenly.
        scale: factor on the scores; head_dim**-0.5 if None.
        is_causal: token i attends to tokens 0..i only.
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the projection; none where norm_weight is None.
        residual: [batch, tokens, out_width], in any dtype.
        subtract: take the result from the residual instead of adding it.
        lengths: [batch], int32 or int64: of sample b, tokens from ``lengths[b]`` on are padding. Attention passes them by, in
            both directions; they still get the bias and their own residual.
        dropout: probability, on the attention weights and after the output projection, as in the official module. Pass 0
            for evaluation. The random numbers are PyTorch's: ``torch.manual_seed`` reproduces them.

    On the Triton path three launches forward, or two for small batches (``one_launch.is_chosen``). With lengths or dropout the
    projections are the library's.

    Returns:
        [batch, tokens, out_width]: without residual in x's dtype (the autocast dtype under autocast); with one, in the
        wider of the two dtypes.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit, the projected width is not divisible by the heads, or ``subtract`` has no residual.
        RuntimeError: a forced implementation cannot run on x.

    Source: CRATE (arXiv 2306.01129), section 2.3; CRATE-MAE (arXiv 2404.02446), section 3.
    """
    check(x, qkv_weight, out_weight, out_bias, num_heads, norm_weight, norm_bias, norm_eps, residual, subtract)
    head_dim = qkv_weight.shape[0] // num_heads
    if scale is None:
        scale = head_dim**-0.5
    checks.number("scale", scale, positive=True)
    check_padding_and_dropout(x, 1, lengths, dropout, None)

    dtype = compute_dtype(x)
    implementation = dispatch.choose(x, dtype, obstacle_to_triton(head_dim))
    fits = residual is None or residual.dtype in dispatch.TRITON_DTYPES
    if implementation == "triton" and out_weight is not None and lengths is None and dropout == 0 and fits:
        out_dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
        weights = qkv_weight, out_weight, out_bias, norm_weight, norm_bias
        settings = float(norm_eps), residual is x, subtract, num_heads, float(scale), is_causal, dtype
        return _MSSA.apply(x, None if residual is x else residual, out_dtype, *weights, *settings)

    x = layer_norm(x, norm_weight, norm_bias, norm_eps, before=dtype)
    if implementation == "reference":
        out = reference.mssa(x, qkv_weight, out_weight, out_bias, num_heads, scale, is_causal, lengths, dropout)
    else:
        with no_autocast(x):
            weights = qkv_weight, out_weight, out_bias
            out = composed.mssa(x.to(dtype), *weights, num_heads, scale, is_causal, implementation, lengths, dropout)
    if residual is None:
        return out
    return residual - out if subtract else residual + out


class _MSSA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, out_dtype: torch.dtype, *arguments: Any) -> Tensor:
        out, kept = torch.ops.crate_kernels.mssa_forward(x, residual, out_dtype, *arguments)
        ctx.save_for_backward(x, *arguments[:5], *kept)
        ctx.settings = arguments[5:]
        ctx.residual_dtype = None if residual is None else residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        weights, kept = rest[:5], rest[5:]
        wanted = ctx.needs_input_grad
        needs = [wanted[0], wanted[3] or wanted[6] or wanted[7], wanted[4] or wanted[5]]
        found = [None] * 6
        if any(needs):
            found = torch.ops.crate_kernels.mssa_backward(grad, x, kept, needs, *weights, *ctx.settings)
        grad_x, *grad_weights = [g if want else None for g, want in zip(found, (wanted[0], *wanted[3:8]), strict=True)]
        grad_residual = grad.to(ctx.residual_dtype) if wanted[1] else None
        return grad_x, grad_residual, None, *grad_weights, *[None] * len(ctx.settings)


def check(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    residual: Tensor | None,
    subtract: bool,
) -> None:
    checks.tensor("x", x, "batch tokens width")
    checks.tensor("qkv_weight", qkv_weight, "inner_width width")
    width, inner_width = x.shape[-1], qkv_weight.shape[0]
    checks.shape("qkv_weight", qkv_weight, (inner_width, width), "[num_heads * head_dim, width of x]")
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one token, got {checks.describe(x)}")
    if not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {checks.describe(num_heads)}")
    if num_heads < 1 or inner_width % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of the projected width {inner_width}, got {num_heads} "
            f"(qkv_weight has {checks.describe(qkv_weight)})"
        )
    if out_weight is not None:
        checks.tensor("out_weight", out_weight, "out_width inner_width")
        checks.shape("out_weight", out_weight, (out_weight.shape[0], inner_width), "[out_width, num_heads * head_dim]")
    out_width = inner_width if out_weight is None else out_weight.shape[0]
    if out_bias is not None:
        if out_weight is None:
            raise ValueError("out_bias: given without out_weight")
        checks.tensor("out_bias", out_bias, "out_width")
        checks.shape("out_bias", out_bias, (out_width,), "[out_width]")
    checks.layer_norm(width, norm_weight, norm_bias, norm_eps)
    parameters = dict(qkv_weight=qkv_weight, out_weight=out_weight, out_bias=out_bias)
    checks.same_device_and_dtype(is_autocast(x), x=x, **parameters, norm_weight=norm_weight, norm_bias=norm_bias)
    if residual is not None:
        checks.tensor("residual", residual, "batch tokens out_width")
        checks.shape("residual", residual, (*x.shape[:-1], out_width), "[batch, tokens, out_width]")
        checks.same_device_and_dtype(True, x=x, residual=residual)
    elif subtract:
        raise ValueError("subtract: given without a residual to subtract from")
