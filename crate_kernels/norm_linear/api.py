"""The public function, and the autograd boundary around the operators of the Triton path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_kernels import checks, dispatch
from crate_kernels.norm_linear import composed, op, reference  # noqa: F401  (op registers the operators)
from crate_kernels.precision import compute_dtype, is_autocast, layer_norm, no_autocast
from crate_kernels.products.op import operands
from crate_kernels.products.operand import Norm
from crate_kernels.products.prepared import Prepared, as_prepared, check_prepared


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    prepared: Prepared | None = None,
) -> Tensor:
    """``LN(x) W^T + b``: a linear map with the LayerNorm before it, in two launches on the Triton path.

    Args:
        x: [..., width]; float32, float16 or bfloat16 (float64 off the Triton path), any strides.
        weight: W, [out_width, width]. Under autocast it may stay in its own dtype; otherwise its dtype is x's.
        bias: [out_width], or None.
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the product; none where norm_weight is None.
        prepared: this operator's part of what ``prepare_layers`` gave, checked against the weights; made here if None. Not
            looked at off the Triton path.

    Returns:
        [..., out_width] in x's dtype (the autocast dtype under autocast), as ``F.linear(F.layer_norm(x))`` would be.

    On the Triton path it is deterministic and cannot be differentiated again. Kept for its backward are x and, with a LayerNorm,
    the result and two numbers a token.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit.
        RuntimeError: a forced implementation cannot run on x.

    Source: the decoder's step of CRATE-MAE (arXiv 2404.02446), section 3.
    """
    check(x, weight, bias, norm_weight, norm_bias, norm_eps)
    dtype = compute_dtype(x)
    implementation = dispatch.choose(x, dtype)
    if implementation == "triton":
        weights = weight, bias, norm_weight, norm_bias
        if prepared is None:
            norm = None if norm_weight is None else Norm(norm_weight, norm_bias)
            (prepared,) = prepare_norm_linear([(weight, bias, norm)], dtype)
        else:
            check_prepared(prepared, dtype, weights)
        y = _NormLinear.apply(x.reshape(-1, x.shape[-1]), *weights, *prepared.operands[0], float(norm_eps))
        return y.view(*x.shape[:-1], weight.shape[0])
    x = layer_norm(x, norm_weight, norm_bias, norm_eps, before=dtype)
    if implementation == "reference":
        return reference.norm_linear(x, weight, bias)
    with no_autocast(x):
        return composed.norm_linear(x, weight, bias, dtype)


def prepare_norm_linear(
    layers: Sequence[tuple[Tensor, Tensor | None, Norm | None]], dtype: torch.dtype
) -> list[Prepared]:
    """What products in ``dtype`` take of (weight, bias, norm) of operators of one shape, in one launch."""
    made = operands(
        [w.mT for w, _, _ in layers], [bias for _, bias, _ in layers], [norm for _, _, norm in layers], dtype
    )
    return [
        as_prepared((one,), (weight, bias, *((None, None) if norm is None else norm[:2])))
        for one, (weight, bias, norm) in zip(made, layers, strict=True)
    ]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        y, kept = torch.ops.crate_kernels.norm_linear_forward(x, *arguments)
        ctx.save_for_backward(x, *arguments[:7], *([y, *kept] if kept else []))
        ctx.norm_eps = arguments[7]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        tensors, kept = rest[:7], rest[7:]
        wanted = ctx.needs_input_grad[:5]
        found = [None] * 5
        needs = wanted[0], any(wanted[1:])
        if any(needs):
            found = torch.ops.crate_kernels.norm_linear_backward(grad, x, kept, *needs, *tensors, ctx.norm_eps)
        return *[g if want else None for g, want in zip(found, wanted, strict=True)], *[None] * 4


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> None:
    checks.tensor("x", x, "... width")
    checks.tensor("weight", weight, "out_width width")
    width, out_width = x.shape[-1], weight.shape[0]
    checks.shape("weight", weight, (out_width, width), "[out_width, width of x]")
    if out_width == 0:
        raise ValueError(f"weight: expected at least one row, got {checks.describe(weight)}")
    if bias is not None:
        checks.tensor("bias", bias, "out_width")
        checks.shape("bias", bias, (out_width,), "[out_width]")
    checks.layer_norm(width, norm_weight, norm_bias, norm_eps)
    tensors = dict(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    checks.same_device_and_dtype(is_autocast(x), **tensors)
