"""Encoder and decoder layers as kernels: MSSA and the sparse step one after the other, on what was prepared of their weights.

    encoder    z = x + MSSA(LN x)        y = ISTA(LN z)               six launches
    decoder    g = LN(x) W^T             y = g - MSSA(LN g)           six launches

Of [tokens, width] tensors the encoder keeps x, w, attention's output and z, the decoder x, g, w and attention's output; y is the
next layer's x. With ``recompute`` they keep x and z, or x and g, and do projection and attention again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.ista import triton as sparse
from crate_kernels.mssa import triton as attention
from crate_kernels.products.operand import MatrixGradient, Norm, Operand, gradient
from crate_kernels.products.preparation import combine, combine_all, prepare, prepare_all
from crate_kernels.products.triton import gradient_rows, input_gradient, project, weight_gradient


class Weights(NamedTuple):
    """attention: MSSA's, LayerNorm included. norm, matrix: of the sparse step, W [width, width] (decoder: the linear step's)."""

    attention: attention.Weights
    norm: Norm
    matrix: Tensor


class Prepared(NamedTuple):
    """Operands of the layer's products, and for an encoder G = W - W^T W. ``flat`` and ``of`` are there for the operators."""

    qkv: Operand
    out: Operand
    step: Operand
    combined: Tensor | None

    def flat(self) -> list[Tensor]:
        return [t for t in (*self.qkv, *self.step, *self.out, self.combined) if t is not None]

    @classmethod
    def of(cls, tensors: list[Tensor], has_bias: bool) -> Prepared:
        qkv, step, (matrix, *rest) = Operand(*tensors[:3]), Operand(*tensors[3:6]), tensors[6:]
        offset = rest.pop(0) if has_bias else None
        return cls(qkv, Operand(matrix, None, offset), step, rest[0] if rest else None)


class Kept(NamedTuple):
    """middle: z or g [batch * tokens, width]; stats: of the sparse step's LayerNorm; attention: None when it is recomputed."""

    middle: Tensor
    stats: Tensor
    attention: attention.Kept | None

    def flat(self) -> list[Tensor]:
        return [self.middle, self.stats, *(self.attention or ())]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Kept:
        return cls(*tensors[:2], attention.Kept(*tensors[2:]) if len(tensors) > 2 else None)


class Gradients(NamedTuple):
    """x [batch * tokens, width], attention's, and those of the sparse step's matrix and LayerNorm; None where not asked for."""

    x: Tensor | None
    attention: attention.Gradients
    step: MatrixGradient | None


def prepare_layer(weights: Weights, step: sparse.Step | None, dtype: torch.dtype) -> Prepared:
    """Of one layer: an encoder where there is a ``step``, else a decoder."""
    qkv, out = weights.attention.operands(dtype)
    if step is None:
        return Prepared(qkv, out, prepare(weights.matrix.contiguous().mT, None, weights.norm, dtype), None)
    combined, operand = combine(weights.matrix, weights.norm, step.step_size, dtype)
    return Prepared(qkv, out, operand, combined)


def prepare_layers(layers: Sequence[Weights], step: sparse.Step | None, dtype: torch.dtype) -> list[Tensor]:
    """Of layers of one kind and size in two launches, decoders in one; one more where attention is wider than the tokens.

    For ``op.split_prepared``, which says what each tensor is.
    """
    roles = [
        [(one.attention.qkv, None, one.attention.norm) for one in layers],
        [(one.attention.out, one.attention.out_bias, None) for one in layers],
    ]
    found: list[Tensor] = []
    if step is None:
        roles.append([(one.matrix, None, one.norm) for one in layers])
    else:
        combined, operand = combine_all([w.matrix for w in layers], [w.norm for w in layers], step.step_size, dtype)
        found += [combined, *operand]
    if layers[0].attention.qkv.shape == layers[0].attention.out.shape:
        roles = [[row for role in roles for row in role]]
    for role in roles:
        matrices, biases, norms = zip(*role, strict=True)
        found += prepare_all([matrix.contiguous().mT for matrix in matrices], biases, norms, dtype)
    return found


def encoder_forward(
    x: Tensor, weights: Weights, prepared: Prepared, form: attention.Form, step: sparse.Step
) -> tuple[Tensor, Kept]:
    """y [batch * tokens, width] in the dtype of x [batch, tokens, width]."""
    operands = prepared.qkv, prepared.out
    z, kept = attention.forward(x, weights.attention, operands, form, x.flatten(0, 1), x.dtype)
    y, stats = sparse.forward(z, prepared.step, weights.norm, step, x.dtype)
    return y, Kept(z, stats, kept)


def encoder_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kept: Kept,
    weights: Weights,
    prepared: Prepared,
    form: attention.Form,
    step: sparse.Step,
    need_x: bool,
    need_weights: bool,
) -> Gradients:
    """The gradients asked for, from grad [batch * tokens, width] of y."""
    grad_z, step_gradient = sparse.backward(
        grad, kept.middle, y, weights.matrix, prepared.combined, prepared.step, kept.stats, weights.norm, step,
        True, need_weights,
    )  # fmt: skip
    attended = kept.attention or attention.attend(x, weights.attention.norm, prepared.qkv, form)
    needs = need_x, need_weights, need_weights
    operands = prepared.qkv, prepared.out
    of_attention = attention.backward(grad_z, x, weights.attention, operands, form, attended, needs, past=grad_z)
    return Gradients(of_attention.x, of_attention, step_gradient)


def decoder_forward(x: Tensor, weights: Weights, prepared: Prepared, form: attention.Form) -> tuple[Tensor, Kept]:
    """y [batch * tokens, width] in the dtype of the products, for x [batch, tokens, width] in any."""
    dtype = prepared.step.matrix.dtype
    g, stats = project(x.flatten(0, 1), prepared.step, dtype, norm=weights.norm)
    operands = prepared.qkv, prepared.out
    y, kept = attention.forward(g.view(x.shape), weights.attention, operands, form, g, dtype)
    return y, Kept(g, stats, kept)


def decoder_backward(
    grad: Tensor,
    x: Tensor,
    kept: Kept,
    weights: Weights,
    prepared: Prepared,
    form: attention.Form,
    need_x: bool,
    need_weights: bool,
) -> Gradients:
    """The gradients asked for, from grad [batch * tokens, width] of y."""
    g = kept.middle.view(x.shape)
    attended = kept.attention or attention.attend(g, weights.attention.norm, prepared.qkv, form)
    needs = True, need_weights, need_weights
    operands = prepared.qkv, prepared.out
    of_attention = attention.backward(grad, g, weights.attention, operands, form, attended, needs, past=grad)
    tokens, grad_g, dtype, grad_x, of_step = x.flatten(0, 1), of_attention.x, prepared.step.matrix.dtype, None, None
    of_product = dict(y=kept.middle, norm=weights.norm, stats=kept.stats)
    rows = gradient_rows(
        grad_g, tokens, dtype, operand=prepared.step, **of_product, need_input=need_x, need_weight=need_weights
    )
    if need_weights:
        sums = weight_gradient(tokens, grad_g, dtype, rows=rows)
        of_step = gradient(*sums, weights.matrix.t(), None, weights.norm)
    if need_x:
        grad_x = input_gradient(grad_g, prepared.step, x.dtype, **of_product, x=tokens, rows=rows)
    return Gradients(grad_x, of_attention, of_step)
