"""PyTorch operators of the linear step on the Triton path: schemas, shapes, FLOP counts. Imports no Triton.

``kept`` is what the backward needs besides x. With a LayerNorm the forward returns [moments], mean and rstd [2, tokens] float32,
and the backward takes [y, moments]; without one both lists are empty. The composed path has no operator of its own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, Protocol

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


def forward(x: Tensor, given: NormLinearArguments) -> tuple[Tensor, list[Tensor]]:
    return forward_in_layer(x, given)[:2]


def forward_in_layer(
    x: Tensor, given: NormLinearArguments, parts_for: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor], Any]:
    """``forward``; the moments of the result come third, in parts for a product in the dtype ``parts_for``
    (``products.launchers``)."""
    kernels, operand = given.load()
    y, moments, parts = kernels.forward(x, operand, given.norm, parts_for)
    return y, [] if moments is None else [moments], parts


def backward(
    grad: Tensor, x: Tensor, kept: list[Tensor], need_x: bool, need_weights: bool, given: NormLinearArguments
) -> list[Tensor]:
    kernels, operand = given.load()
    y, moments = kept or (None, None)
    grads = kernels.backward(grad, x, y, moments, given.weight, operand, given.norm, need_x, need_weights)
    return or_empty(grads, (x, *given[:4]))


def forward_fake(x: Tensor, given: NormLinearArguments) -> tuple[Tensor, list[Tensor]]:
    y = x.new_empty(x.shape[0], given.weight.shape[0], dtype=given.matrix.dtype)
    return y, [] if given.norm_weight is None else [x.new_empty(2, x.shape[0], dtype=torch.float32)]


def backward_fake(
    grad: Tensor, x: Tensor, kept: Any, need_x: bool, need_weights: bool, given: NormLinearArguments
) -> list[Tensor]:
    return empty_gradients((x, *given[:4]), (need_x, *[need_weights] * 4))


class _Shapes(Protocol):
    """What FLOP formulas read of ``NormLinearArguments``, whose tensors come to them as shapes."""

    weight: tuple[int, int]


def forward_flops(x_shape: tuple[int, ...], given: _Shapes) -> int:
    return 2 * x_shape[0] * given.weight[0] * given.weight[1]


def backward_flops(grad: Any, x: tuple[int, ...], kept: Any, need_x: bool, need_weights: bool, given: _Shapes) -> int:
    return forward_flops(x, given) * (need_x + need_weights)


register("norm_linear_forward", forward, fake=forward_fake, flops=forward_flops, replayed=True)
register("norm_linear_backward", backward, fake=backward_fake, flops=backward_flops, replayed=True)
