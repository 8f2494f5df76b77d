"""The linear step as kernels: a pass for a LayerNorm's moments and one product forward, two products backward.

The backward keeps x and, with a LayerNorm, the result y and two numbers a token (mean and rstd).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crate_kernels.products.launchers import Projected, gradients, project
from crate_kernels.products.norm_folding import Norm, Operand
from crate_kernels.products.preparation import matrix_gradients


def forward(x: Tensor, operand: Operand, norm: Norm | None, parts_for: torch.dtype | None = None) -> Projected:
    """y [tokens, out_width] in the dtype of the product; with a LayerNorm, mean and rstd of each token; the moments of y in parts
    for the next product, whose dtype is ``parts_for``."""
    return project(x, operand, operand.matrix.dtype, norm=norm, parts_for=parts_for)


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor | None,
    weight: Tensor,
    operand: Operand,
    norm: Norm | None,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, ...]:
    """dx [tokens, width] in x's dtype, and the gradients of weight, bias, and the LayerNorm's weight and bias.

    y and moments are the forward's results; with a LayerNorm both are needed.
    """
    found = gradients(
        grad, x, operand, x.dtype, y=y, norm=norm, moments=moments,
        need_x=need_x, need_matrix=need_weights, need_column=need_weights and operand.offset is not None,
    )  # fmt: skip
    if found.matrix is None:
        return found.x, None, None, None, None
    if norm is None:
        return found.x, found.matrix.t(), found.column, None, None
    matrix, gamma, beta, _ = matrix_gradients(found, weight.t(), norm)
    return found.x, matrix.t(), found.column, gamma, beta
