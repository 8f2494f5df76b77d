"""MSSA as kernels: three launches forward, and one more for a LayerNorm's moments.

    w = LN(x) U^T      out = softmax(scale * w w^T) w, head by head      z = skip +- (out W_out^T + b)

The backward keeps x, w, out, one number for each row of scores (the log-sum-exp) and two for each token (mean and rstd).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.products import launchers as products
from crate_kernels.products.norm_folding import Norm, Operand
from crate_kernels.products.preparation import matrix_gradients
from crate_kernels.shared_attention import triton as attention
from crate_kernels.shared_attention.mask import Mask


class Form(NamedTuple):
    """Everything about MSSA but its weights."""

    num_heads: int
    scale: float
    subtract: bool
    mask: Mask = Mask()


class Kept(NamedTuple):
    """w and out [batch * tokens, inner] in the dtype of the products, lse [batch, heads, tokens], moments [2, batch * tokens]."""

    w: Tensor
    out: Tensor
    lse: Tensor
    moments: Tensor | None


def forward(
    x: Tensor,
    norm: Norm | None,
    qkv: Operand,
    out: Operand,
    form: Form,
    skip: Tensor | None,
    out_dtype: torch.dtype,
    moments: Tensor | products.PartMoments | None = None,
    parts_for: torch.dtype | None = None,
) -> tuple[Tensor, Kept, products.PartMoments | None]:
    """z [batch * tokens, out_width] in ``out_dtype``, for x [batch, tokens, width], skip [batch * tokens, out_width]. ``moments``
    are those of x, if they are known; those of z are returned in parts for the next product, whose dtype is ``parts_for``."""
    kept = attend(x, norm, qkv, form, moments)
    z, _, parts = products.project(kept.out, out, out_dtype, skip=skip, negate=form.subtract, parts_for=parts_for)
    return z, kept, parts


def attend(
    x: Tensor, norm: Norm | None, qkv: Operand, form: Form, moments: Tensor | products.PartMoments | None = None
) -> Kept:
    """The first two steps, projection and attention."""
    w, found, _ = products.project(x.flatten(0, 1), qkv, qkv.matrix.dtype, norm=norm, moments=moments)
    out, lse = attention.attend(_heads(w, x, form), form.scale, form.mask)
    return Kept(w, _tokens(out), lse, found)


def backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm | None,
    qkv: Operand,
    out: Operand,
    form: Form,
    qkv_weight: Tensor,
    kept: Kept,
    needs: tuple[bool, bool, bool],
    skip_grad: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """dx [batch * tokens, width], and the gradients of qkv, out, out's bias, and the LayerNorm's weight and bias.

    Args:
        grad: [batch * tokens, out_width], the gradient of z.
        needs: which gradients are asked for: of x; of qkv and the LayerNorm; of out and its bias.
        skip_grad: [batch * tokens, width], added to dx: the gradient that reaches x as the skip.
    """
    need_x, need_qkv, need_out = needs
    dtype = kept.w.dtype
    out_grads = products.gradients(
        grad, kept.out, out, dtype, negate=form.subtract, scores=(kept.lse, form.scale),
        need_x=need_x or need_qkv, need_matrix=need_out, need_column=need_out and out.offset is not None,
    )  # fmt: skip
    grad_out_weight = None if out_grads.matrix is None else out_grads.matrix.t()
    if out_grads.x is None:
        return None, None, grad_out_weight, out_grads.column, None, None
    grad_attended, w, attended = (_heads(t, x, form) for t in (out_grads.x, kept.w, kept.out))
    pairs = out_grads.row_pairs
    if pairs is None:
        pairs = attention.row_pairs(grad_attended, attended, kept.lse, form.scale)
    grad_w = attention.gradient(grad_attended, w, pairs, form.scale, form.mask)
    qkv_grads = products.gradients(
        _tokens(grad_w), x.flatten(0, 1), qkv, x.dtype, y=kept.w, norm=norm, moments=kept.moments, extra=skip_grad,
        need_x=need_x, need_matrix=need_qkv, need_column=need_qkv and norm is not None,
    )  # fmt: skip
    grad_qkv, grad_gamma, grad_beta = qkv_grads.matrix, None, None
    if need_qkv and norm is not None:
        grad_qkv, grad_gamma, grad_beta, _ = matrix_gradients(qkv_grads, qkv_weight.t(), norm)
    grad_qkv_weight = None if grad_qkv is None else grad_qkv.t()
    return qkv_grads.x, grad_qkv_weight, grad_out_weight, out_grads.column, grad_gamma, grad_beta


def _heads(tokens: Tensor, x: Tensor, form: Form) -> Tensor:
    """[batch * tokens, inner] -> a view [batch, heads, tokens, head_dim]."""
    head_dim = tokens.shape[1] // form.num_heads
    return tokens.view(x.shape[0], x.shape[1], form.num_heads, head_dim).transpose(1, 2)


def _tokens(heads: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim], memory in the order of tokens -> a view [batch * tokens, inner]."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)
