"""What a matrix becomes before tokens are multiplied with it (``preparation``), and how gradients come back from there.

With a LayerNorm of weight gamma and bias beta before the product,

    LN(x) B = rstd * (x B' - mean * column_sum) + offset,   B' = diag(gamma) B,   offset = beta B + bias

so the raw tokens are multiplied, and mean and rstd, one pair a token, enter behind the product. ``column_sum`` sums B' as
rounded to the dtype of the product: the rounding errors of both terms then cancel however far the mean is from zero.
Without a LayerNorm B' is B, and offset the bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """A LayerNorm before a product: weight and bias [width], any floating dtype (bias may be None), and epsilon."""

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5


class Operand(NamedTuple):
    """A matrix ready to be multiplied with.

    matrix: B' [inner, width] in the dtype of the product, any strides.
    column_sum: [width] float32, sums over ``inner`` of B' as rounded; None without a LayerNorm.
    offset: [width] float32, added to the product; None without a LayerNorm where there is no bias.
    """

    matrix: Tensor
    column_sum: Tensor | None
    offset: Tensor | None


class MatrixGradient(NamedTuple):
    """Gradients of what ``preparation.prepare`` took, float32; None where it took nothing."""

    matrix: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def gradient(
    product_gradient: Tensor, column_gradient: Tensor | None, matrix: Tensor, bias: Tensor | None, norm: Norm | None
) -> MatrixGradient:
    """Gradients of B, bias, gamma and beta, from those of the product.

    Args:
        product_gradient: H = xhat^T g [inner, width] float32, with xhat the tokens normalised (or as they are).
        column_gradient: sums over tokens of g, [width] float32; None where there is neither bias nor LayerNorm.
        matrix, bias, norm: what ``preparation.prepare`` took.

    dB = gamma * H + beta (x) colsum(g), dgamma = rowsum(B * H), dbeta = B colsum(g).
    """
    grad_bias = None if bias is None else column_gradient
    if norm is None:
        return MatrixGradient(product_gradient, grad_bias, None, None)
    grad_norm_weight = (matrix * product_gradient).sum(1)
    grad_matrix = product_gradient * norm.weight.float()[:, None]
    grad_norm_bias = None
    if norm.bias is not None:
        grad_norm_bias = torch.mv(matrix.float(), column_gradient)
        grad_matrix = torch.addr(grad_matrix, norm.bias.float(), column_gradient)
    return MatrixGradient(grad_matrix, grad_bias, grad_norm_weight, grad_norm_bias)
