"""The public function, and the autograd boundary around the operators of the Triton path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crate_kernels import dispatch, validation
from crate_kernels._ops import ops
from crate_kernels.autograd import asked, derivative, save, saved
from crate_kernels.dtypes import compute_dtype, no_autocast
from crate_kernels.layer_norm import layer_norm
from crate_kernels.mssa import composed, op, reference
from crate_kernels.products.norm_folding import as_norm
from crate_kernels.products.op import operands
from crate_kernels.products.prepared import Prepared, as_prepared, checked_or_made
from crate_kernels.shared_attention.api import check_dropout, checked_scale, obstacle_to_triton
from crate_kernels.shared_attention.mask import Mask, checked_mask


class AttentionWeights(NamedTuple):
    """The weights of MSSA: qkv [num_heads * head_dim, width]; out [width, num_heads * head_dim], or None as in ``mssa``;
    out_bias [width] or None."""

    qkv: Tensor
    out: Tensor | None
    out_bias: Tensor | None


def mssa(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None = None,
    *,
    num_heads: int,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    skip: Tensor | None = None,
    subtract: bool = False,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    out_dtype: torch.dtype | None = None,
    recompute: bool = False,
    prepared: Prepared | None = None,
) -> Tensor:
    """Multi-head subspace self-attention: ``softmax(scale * w w^T) w W_out^T + b`` with ``w = x U^T`` split into heads.

    With a LayerNorm, x is normalised first. With a skip the result is ``skip + MSSA(x)``, or, with ``subtract``
    (the CRATE-MAE decoder), ``skip - MSSA(x)``.

    Args:
        x: [batch, tokens, width]; float32, float16 or bfloat16 (float64 off the Triton path), any strides.
        qkv_weight: U, [num_heads * head_dim, width], the one projection for query, key and value.
        out_weight: [out_width, num_heads * head_dim], or None where the official projection is the identity (one head as
            wide as the model).
        out_bias: [out_width], or None.
        num_heads: heads that share the rows of ``qkv_weight`` evenly.
        scale: factor on the scores; head_dim**-0.5 if None; [num_heads] for one for each head.
        is_causal: token i attends to tokens 0..i only.
        window: tokens attend to those at most so many places away.
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the projection; none where norm_weight is None.
        skip: [batch, tokens, out_width], in any dtype: what the result is added to (the residual connection).
        subtract: take the result from the skip instead of adding it.
        lengths: [batch], int32 or int64: in sample b, tokens from ``lengths[b]`` on are padding. No token attends to them, and
            they attend to none; their results are the bias and their skip.
        key_mask: [batch, tokens], bool: only tokens with True are attended to.
        cu_seqlens: [sequences + 1], int32 or int64: sequences packed into a batch of 1. All four, and ``scale``, as in
            ``shared_qkv_attention``.
        dropout: probability, on the attention weights and after the output projection, as in the official module. Pass 0
            for evaluation. The random numbers are PyTorch's: ``torch.manual_seed`` reproduces them.
        out_dtype: the dtype of the result, if another is wanted than below.
        recompute: compute projection and attention again in the backward, instead of keeping their results.
        prepared: this operator's part of what ``prepare_layers`` returned, checked against the weights; made here if None.
            Ignored off the Triton path.

    The Triton path takes three launches forward, and one more for a LayerNorm's moments. With dropout, or a scale
    for each head, PyTorch computes the projections. It is deterministic, and second derivatives are refused there; the composed
    path has them where ``shared_qkv_attention`` has.

    Returns:
        [batch, tokens, out_width]: without skip in x's dtype (the autocast dtype under autocast); with one, in the
        wider of the two dtypes.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit, the projected width is not divisible by the heads, or ``subtract`` has no skip.
        RuntimeError: a forced implementation cannot run on x.

    Source: CRATE (arXiv 2306.01129), section 2.3; CRATE-MAE (arXiv 2404.02446), section 3.
    """
    chosen = choose(
        x, qkv_weight, out_weight, out_bias, num_heads=num_heads, scale=scale, is_causal=is_causal, window=window,
        norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, skip=skip, subtract=subtract, lengths=lengths,
        key_mask=key_mask, cu_seqlens=cu_seqlens, dropout=dropout, out_dtype=out_dtype, recompute=recompute, prepared=prepared,
    )  # fmt: skip
    implementation, dtype, result_dtype, factor, mask, given = chosen
    if given is not None:
        return _MSSA.apply(x, None if skip is x else skip, result_dtype, *given)

    def composition(x: Tensor, skip: Tensor | None) -> Tensor:
        normalised = layer_norm(x, norm_weight, norm_bias, norm_eps, before=dtype)
        settings = qkv_weight, out_weight, out_bias, num_heads, factor, mask, dropout
        if implementation == "reference":
            out = reference.mssa(normalised, *settings)
        else:
            with no_autocast(x):
                out = composed.mssa(normalised.to(dtype), *settings, implementation)
        if skip is not None:
            out = skip - out if subtract else skip + out
        return out.to(result_dtype)

    if recompute and dispatch.plain_calls_only() is None:  # transforms and exports cannot take a checkpoint
        return checkpoint(composition, x, skip, use_reentrant=False, preserve_rng_state=dropout > 0)
    return composition(x, skip)


class Chosen(NamedTuple):
    """How ``mssa`` computes.

    implementation: what ``dispatch.choose`` said.
    dtype, out_dtype: of the products, and of the result.
    scale: the factor on the scores, or one for each head.
    mask: which tokens a token attends to.
    given: the arguments of one operator that does it all; None where there is none.
    """

    implementation: str
    dtype: torch.dtype
    out_dtype: torch.dtype
    scale: float | Tensor
    mask: Mask
    given: op.MSSAArguments | None


def choose(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None = None,
    *,
    num_heads: int,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    skip: Tensor | None = None,
    subtract: bool = False,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    out_dtype: torch.dtype | None = None,
    recompute: bool = False,
    prepared: Prepared | None = None,
) -> Chosen:
    """Checks the arguments of ``mssa``, and chooses how it computes. Only the layouts of x and skip are looked at."""
    out_width = "heads_width" if out_weight is None else "out_width"
    validation.tensors(
        norm=(norm_weight, norm_bias, norm_eps),
        any_dtype="skip",
        x=(x, "batch tokens width"),
        qkv_weight=(qkv_weight, "heads_width width"),
        out_weight=(out_weight, "out_width heads_width"),
        out_bias=(out_bias, "out_width"),
        skip=(skip, f"batch tokens {out_width}"),
    )
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one token, got {validation.describe(x)}")
    if not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {validation.describe(num_heads)}")
    if num_heads < 1 or qkv_weight.shape[0] % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of the projected width {qkv_weight.shape[0]}, got {num_heads} "
            f"(qkv_weight has {validation.describe(qkv_weight)})"
        )
    if out_bias is not None and out_weight is None:
        raise ValueError("out_bias: given without out_weight")
    if subtract and skip is None:
        raise ValueError("subtract: given without a skip to subtract from")
    head_dim = qkv_weight.shape[0] // num_heads
    factor = checked_scale(scale, num_heads, head_dim, x)
    mask = checked_mask(x, 1, is_causal, window, lengths, key_mask, cu_seqlens)
    check_dropout(dropout, None)

    dtype = compute_dtype(x)
    weights = qkv_weight, out_weight, norm_weight, norm_bias
    implementation = dispatch.choose("mssa", x, dtype, obstacle_to_triton(head_dim), weights)
    if out_dtype is None:
        out_dtype = dtype if skip is None else torch.promote_types(dtype, skip.dtype)
    fits = skip is None or skip.dtype in dispatch.TRITON_DTYPES
    given = None
    if implementation == "triton" and out_weight is not None and isinstance(factor, float) and dropout == 0 and fits:
        made_of = MSSASources(qkv_weight, out_weight, out_bias, norm_weight, norm_bias)
        qkv, out = checked_or_made(prepared, made_of, dtype, prepare_mssa).operands
        given = op.MSSAArguments(
            *made_of, *qkv, out.matrix, out.offset, float(norm_eps), skip is x, subtract, num_heads, factor, recompute,
            mask.is_causal, mask.window, mask.lengths, mask.spans, mask.key_mask,
        )  # fmt: skip
    return Chosen(implementation, dtype, out_dtype, factor, mask, given)


class MSSASources(NamedTuple):
    """What ``prepare_mssa`` takes of one operator."""

    qkv_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def prepare_mssa(layers: Sequence[MSSASources], dtype: torch.dtype) -> list[Prepared]:
    """The two matrices that each operator multiplies with in ``dtype``; all operators have one shape."""
    first, last = [layer.qkv_weight.mT for layer in layers], [layer.out_weight.mT for layer in layers]
    norms = [as_norm(layer.norm_weight, layer.norm_bias) for layer in layers]
    biases, none = [layer.out_bias for layer in layers], [None] * len(layers)
    if first[0].shape == last[0].shape:  # then one launch makes both
        made = operands([*first, *last], [*none, *biases], [*norms, *none], dtype)
        qkv, out = made[: len(layers)], made[len(layers) :]
    else:
        qkv, out = operands(first, none, norms, dtype), operands(last, biases, none, dtype)
    return [as_prepared(pair, layer) for pair, layer in zip(zip(qkv, out, strict=True), layers, strict=True)]


class _MSSA(torch.autograd.Function):
    """Arguments: x, skip, the result's dtype, and ``op.MSSAArguments``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, *arguments: Any) -> Tensor:
        out, kept = ops.mssa_forward(x, skip, out_dtype, *arguments)
        save(ctx, op.MSSAArguments(*arguments), x, *kept)
        ctx.skip_dtype = None if skip is None else skip.dtype
        return out

    @staticmethod
    @derivative("mssa")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, (x, *kept) = saved(ctx)
        want_x, want_skip, _, *want_fields = ctx.needs_input_grad
        want = op.MSSAArguments(*want_fields)
        needs = [want_x, want.qkv_weight or want.norm_weight or want.norm_bias, want.out_weight or want.out_bias]
        grad_x, *grads = ops.mssa_backward(grad, x, kept, needs, *given) if any(needs) else [None]
        return asked((grad_x, grad.to(ctx.skip_dtype) if want_skip else None, None, *grads), ctx.needs_input_grad)
