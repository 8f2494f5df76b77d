"""MSSA as kernels: three launches forward, one more for a LayerNorm's moments; for small batches two in all.

    w = LN(x) U^T      out = softmax(scale * w w^T) w, head by head      z = residual +- (out W_out^T + b)

Kept for the backward are x, w, out, one number a score row (the log-sum-exp) and two a token (mean and rstd).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.mssa import one_launch as together
from crate_kernels.products.operand import MatrixGradient, Norm, Operand, gradient
from crate_kernels.products.preparation import prepare
from crate_kernels.products.triton import gradient_rows, input_gradient, project, weight_gradient
from crate_kernels.shared_attention import triton as attention


class Weights(NamedTuple):
    """qkv [inner, width], out [out_width, inner], out_bias [out_width] or None, and the LayerNorm before them or None."""

    qkv: Tensor
    out: Tensor
    out_bias: Tensor | None
    norm: Norm | None

    def operands(self, dtype: torch.dtype) -> tuple[Operand, Operand]:
        """Of both projections, for products in ``dtype``."""
        qkv, out = self.qkv.contiguous().mT, self.out.contiguous().mT
        return prepare(qkv, None, self.norm, dtype), prepare(out, self.out_bias, None, dtype)


class Form(NamedTuple):
    """Everything about MSSA that is not a tensor."""

    num_heads: int
    scale: float
    is_causal: bool
    subtract: bool


class Kept(NamedTuple):
    """w and out [batch * tokens, inner] in the dtype of the products, lse [batch, heads, tokens], stats [2, batch * tokens]."""

    w: Tensor
    out: Tensor
    lse: Tensor
    stats: Tensor | None


class Gradients(NamedTuple):
    """dx [batch * tokens, width], and those of ``Weights`` in float32; None where not asked for."""

    x: Tensor | None
    qkv: MatrixGradient | None
    out: MatrixGradient | None


def forward(
    x: Tensor,
    weights: Weights,
    operands: tuple[Operand, Operand],
    form: Form,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Kept]:
    """z [batch * tokens, out_width] in ``out_dtype``, for x [batch, tokens, width], residual [batch * tokens, out_width]."""
    kept = attend(x, weights.norm, operands[0], form)
    z, _ = project(kept.out, operands[1], out_dtype, skip=residual, negate=form.subtract)
    return z, kept


def attend(x: Tensor, norm: Norm | None, qkv: Operand, form: Form, one_launch: bool | None = None) -> Kept:
    """The first two steps, projection and attention: in one launch or in two, as ``one_launch`` says or else the shape."""
    if one_launch is None:
        one_launch = together.is_chosen(x.shape[0], form.num_heads, x.shape[1])
    if one_launch:
        return Kept(*together.attend(x, norm, qkv, form.num_heads, form.scale, form.is_causal))
    w, stats = project(x.flatten(0, 1), qkv, qkv.matrix.dtype, norm=norm)
    out, lse = attention.forward(_heads(w, x, form), form.scale, form.is_causal)
    return Kept(w, _tokens(out), lse, stats)


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    operands: tuple[Operand, Operand],
    form: Form,
    kept: Kept,
    needs: tuple[bool, bool, bool],
    past: Tensor | None = None,
) -> Gradients:
    """The gradients asked for (x, qkv and its norm, out), from grad [batch * tokens, out_width] of the result.

    ``past`` [batch * tokens, width] is added to dx: the gradient that reaches x past MSSA, where x is its own residual.
    """
    need_x, need_qkv, need_out = needs
    dtype, (qkv, out) = kept.w.dtype, operands
    grad_out_projection = grad_qkv = dx = None
    has_bias = weights.out_bias is not None
    rows = gradient_rows(grad, kept.out, dtype, need_weight=need_out, need_column=has_bias)
    if need_out:
        product, column = weight_gradient(kept.out, grad, dtype, rows=rows)
        if form.subtract:
            product, column = -product, -column if has_bias else None
        grad_out_projection = gradient(product, column, weights.out.t(), weights.out_bias, None)
    if need_x or need_qkv:
        grad_attended = input_gradient(grad, out, dtype, negate=form.subtract, rows=rows)
        heads = [_heads(t, x, form) for t in (grad_attended, kept.w, kept.out)]
        grad_w = _tokens(attention.backward(*heads, kept.lse, form.scale, form.is_causal))
        tokens = x.flatten(0, 1)
        product_form = dict(y=kept.w, norm=weights.norm, stats=kept.stats)
        rows = gradient_rows(
            grad_w, tokens, dtype, operand=qkv, **product_form, need_input=need_x, need_weight=need_qkv,
            need_column=weights.norm is not None,
        )  # fmt: skip
        if need_qkv:
            sums = weight_gradient(tokens, grad_w, dtype, rows=rows)
            grad_qkv = gradient(*sums, weights.qkv.t(), None, weights.norm)
        if need_x:
            dx = input_gradient(grad_w, qkv, x.dtype, **product_form, x=tokens, extra=past, rows=rows)
    return Gradients(dx, grad_qkv, grad_out_projection)


def _heads(tokens: Tensor, x: Tensor, form: Form) -> Tensor:
    """[batch * tokens, inner] -> a view [batch, heads, tokens, head_dim]."""
    head_dim = tokens.shape[1] // form.num_heads
    return tokens.view(x.shape[0], x.shape[1], form.num_heads, head_dim).transpose(1, 2)


def _tokens(heads: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim], memory in the order of tokens -> a view [batch * tokens, inner]."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)
