"""PyTorch operators of the linear step on the Triton path: schemas, shapes, FLOP counts. Imports no Triton.

``kept`` is what the backward needs besides x. With a LayerNorm the forward returns [moments], mean and rstd [2, tokens] float32,
and the backward takes [y, moments]; without one both lists are empty. The composed path has no operator of its own.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from crate_kernels import dispatch
from crate_kernels.definitions import empty_gradients, or_empty, register
from crate_kernels.products.norm_folding import Norm, Operand, as_norm


class NormLinearArguments(NamedTuple):
    """What both operators take after x, in the order of their schemas: weights, the operand made of them, a setting."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    matrix: Tensor
    column_sum: Tensor | None
    offset: Tensor | None
    norm_eps: float

    @property
    def norm(self) -> Norm | None:
        return as_norm(self.norm_weight, self.norm_bias, self.norm_eps)

    def load(self) -> tuple[ModuleType, Operand]:
        """The kernels' module, and the operand."""
        return dispatch.load("norm_linear", "triton"), Operand(self.matrix, self.column_sum, self.offset)


def _forward(x: Tensor, given: NormLinearArguments) -> tuple[Tensor, list[Tensor]]:
    kernels, operand = given.load()
    y, moments = kernels.forward(x, operand, given.norm)
    return y, [] if moments is None else [moments]


def _backward(
    grad: Tensor, x: Tensor, kept: list[Tensor], need_x: bool, need_weights: bool, given: NormLinearArguments
) -> list[Tensor]:
    kernels, operand = given.load()
    y, moments = kept or (None, None)
    grads = kernels.backward(grad, x, y, moments, given.weight, operand, given.norm, need_x, need_weights)
    return or_empty(grads, (x, *given[:4]))


def _forward_fake(x: Tensor, given: NormLinearArguments) -> tuple[Tensor, list[Tensor]]:
    y = x.new_empty(x.shape[0], given.weight.shape[0], dtype=given.matrix.dtype)
    return y, [] if given.norm_weight is None else [x.new_empty(2, x.shape[0], dtype=torch.float32)]


class _Shapes(Protocol):
    """What FLOP formulas read of ``NormLinearArguments``, whose tensors come to them as shapes."""

    weight: tuple[int, int]


def _product(x_shape: tuple[int, ...], given: _Shapes) -> int:
    """FLOPs of one product."""
    return 2 * x_shape[0] * given.weight[0] * given.weight[1]


register("norm_linear_forward", _forward, fake=_forward_fake, flops=_product, replayed=True)
register(
    "norm_linear_backward",
    _backward,
    fake=lambda grad, x, kept, need_x, need_weights, given: empty_gradients(
        (x, *given[:4]), (need_x, *[need_weights] * 4)
    ),
    flops=lambda grad, x, kept, need_x, need_weights, given: _product(x, given) * (need_x + need_weights),
    replayed=True,
)
