"""What a matrix becomes before tokens are multiplied with it, and the LayerNorm that is folded into it.

With a LayerNorm of weight gamma and bias beta before the product,

    LN(x) B = rstd * (x B' - mean * column_sum) + offset,   B' = diag(gamma) B,   offset = beta B + bias

so the raw tokens are multiplied, and the mean and rstd of each token are applied after the product. ``column_sum`` is summed
over B' after B' was rounded to the dtype of the product: then the rounding errors of both terms cancel, however far the mean is
from zero. Without a LayerNorm B' is B, and offset is the bias.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from torch import Tensor, nn


class Norm(NamedTuple):
    """A LayerNorm before a product: weight and bias [width], any floating dtype (bias may be None), and epsilon."""

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5


def as_norm(weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Norm | None:
    """A Norm of these; None without a weight."""
    return None if weight is None else Norm(weight, bias, eps)


class NormOptions(TypedDict, total=False):
    """A LayerNorm as operators take it, by the names of their arguments; empty for none."""

    norm_weight: Tensor
    norm_bias: Tensor | None
    norm_eps: float


def norm_options(norm: Norm | nn.LayerNorm | None) -> NormOptions:
    """``norm`` as keyword arguments of an operator."""
    return {} if norm is None else {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


class Operand(NamedTuple):
    """A matrix ready to be multiplied with.

    matrix: B' [inner, width] in the dtype of the product, any strides.
    column_sum: [width] float32, sums over ``inner`` of B' as rounded; None without a LayerNorm.
    offset: [width] float32, added to the product; None without a LayerNorm and without a bias.
    """

    matrix: Tensor
    column_sum: Tensor | None
    offset: Tensor | None
