"""The public function, and the autograd boundary around the operators of the Triton path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crate_kernels import dispatch, validation
from crate_kernels._ops import ops
from crate_kernels.autograd import asked, derivative, save, saved
from crate_kernels.dtypes import compute_dtype, no_autocast
from crate_kernels.layer_norm import layer_norm
from crate_kernels.norm_linear import composed, op, reference
from crate_kernels.products.norm_folding import as_norm
from crate_kernels.products.op import operands
from crate_kernels.products.prepared import Prepared, as_prepared, checked_or_made


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
    """``LN(x) W^T + b``: a LayerNorm and a linear map, in two launches on the Triton path.

    Args:
        x: [..., width]; float32, float16 or bfloat16 (float64 off the Triton path), any strides.
        weight: W, [out_width, width]. Under autocast it may stay in its own dtype; otherwise its dtype is x's.
        bias: [out_width], or None.
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the product; none where norm_weight is None.
        prepared: this operator's part of what ``prepare_layers`` returned, checked against the weights; made here if None.
            Ignored off the Triton path.

    Returns:
        [..., out_width] in x's dtype (the autocast dtype under autocast), as ``F.linear(F.layer_norm(x))`` would be.

    On the Triton path it is deterministic, and second derivatives are refused. Its backward keeps x and, with a LayerNorm, the
    result and two numbers a token.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit.
        RuntimeError: a forced implementation cannot run on x.

    Source: the decoder's step of CRATE-MAE (arXiv 2404.02446), section 3.
    """
    implementation, dtype, given = choose(
        x, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, prepared=prepared
    )
    if given is not None:
        y = _NormLinear.apply(x.reshape(-1, x.shape[-1]), *given)
        return y.view(*x.shape[:-1], weight.shape[0])
    x = layer_norm(x, norm_weight, norm_bias, norm_eps, before=dtype)
    if implementation == "reference":
        return reference.norm_linear(x, weight, bias)
    with no_autocast(x):
        return composed.norm_linear(x, weight, bias, dtype)


def choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    prepared: Prepared | None = None,
) -> tuple[str, torch.dtype, op.NormLinearArguments | None]:
    """Checks the arguments of ``norm_linear``, and chooses how it computes: the implementation, the dtype of the product, and the
    arguments of one operator that does it all, or None where there is none."""
    validation.tensors(
        norm=(norm_weight, norm_bias, norm_eps),
        x=(x, "... width"),
        weight=(weight, "out_width width"),
        bias=(bias, "out_width"),
    )
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one row, got {validation.describe(weight)}")
    dtype = compute_dtype(x)
    implementation = dispatch.choose("norm_linear", x, dtype, None, (weight, norm_weight, norm_bias))
    if implementation == "triton":
        made_of = NormLinearSources(weight, bias, norm_weight, norm_bias)
        (operand,) = checked_or_made(prepared, made_of, dtype, prepare_norm_linear).operands
        return implementation, dtype, op.NormLinearArguments(*made_of, *operand, float(norm_eps))
    return implementation, dtype, None


class NormLinearSources(NamedTuple):
    """What ``prepare_norm_linear`` takes of one operator."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def prepare_norm_linear(layers: Sequence[NormLinearSources], dtype: torch.dtype) -> list[Prepared]:
    """The matrices that operators of one shape multiply with in ``dtype``, all made in one launch."""
    norms = [as_norm(layer.norm_weight, layer.norm_bias) for layer in layers]
    made = operands([layer.weight.mT for layer in layers], [layer.bias for layer in layers], norms, dtype)
    return [as_prepared((one,), layer) for one, layer in zip(made, layers, strict=True)]


class _NormLinear(torch.autograd.Function):
    """Arguments: x [tokens, width], and ``op.NormLinearArguments``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        y, kept = ops.norm_linear_forward(x, *arguments)
        save(ctx, op.NormLinearArguments(*arguments), x, *([y, *kept] if kept else []))
        return y

    @staticmethod
    @derivative("norm_linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, (x, *kept) = saved(ctx)
        need_x, *want = ctx.needs_input_grad
        grads = ops.norm_linear_backward(grad, x, kept, need_x, any(want), *given)
        return asked(grads, ctx.needs_input_grad)
