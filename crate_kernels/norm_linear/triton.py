"""The linear step as kernels: one product forward, behind a pass for a LayerNorm's moments, and two products backward.

Kept for the backward are x and, with a LayerNorm, the result y and two numbers a token (mean and rstd).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.products.operand import MatrixGradient, Norm, Operand, gradient
from crate_kernels.products.preparation import prepare
from crate_kernels.products.triton import gradient_rows, input_gradient, project, weight_gradient


class Weights(NamedTuple):
    """weight [out_width, width], bias [out_width] or None, and the LayerNorm before them or None."""

    weight: Tensor
    bias: Tensor | None
    norm: Norm | None

    def operand(self, dtype: torch.dtype) -> Operand:
        """For a product in ``dtype``."""
        return prepare(self.weight.t(), self.bias, self.norm, dtype)


def forward(x: Tensor, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """y [tokens, out_width] in ``dtype`` and, with a LayerNorm, mean and rstd of each token."""
    return project(x, weights.operand(dtype), dtype, norm=weights.norm)


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    stats: Tensor | None,
    weights: Weights,
    dtype: torch.dtype,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, MatrixGradient | None]:
    """dx [tokens, width] in x's dtype, and the gradients of ``Weights`` in float32 (the matrix's is [width, out_width]).

    y and stats are what the forward gave; with a LayerNorm both are needed.
    """
    grad_x = grads = None
    operand, of_product = weights.operand(dtype) if need_x else None, dict(y=y, norm=weights.norm, stats=stats)
    need_column = weights.bias is not None or weights.norm is not None
    rows = gradient_rows(
        grad,
        x,
        dtype,
        operand=operand,
        **of_product,
        need_input=need_x,
        need_weight=need_weights,
        need_column=need_column,
    )
    if need_x:
        grad_x = input_gradient(grad, operand, x.dtype, **of_product, x=x, rows=rows)
    if need_weights:
        sums = weight_gradient(x, grad, dtype, rows=rows)
        grads = gradient(*sums, weights.weight.t(), weights.bias, weights.norm)
    return grad_x, grads
