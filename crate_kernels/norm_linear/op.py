"""PyTorch operators of the linear step on the Triton path: schemas, shapes, FLOP counts. Imports torch only.

With a LayerNorm, ``kept`` is what the backward needs besides x: mean and rstd [2, tokens] float32 from the forward, and before
them, for the backward, y. Without one it is empty. The composed path has no operator of its own: it is the library's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels import dispatch
from crate_kernels.precision import undisturbed
from crate_kernels.products.operand import Norm, Operand
from crate_kernels.schemas import empty_gradient, or_empty


class NormLinearArguments(NamedTuple):
    """What both operators take, in the order of their schemas: weights, their operand, a setting."""

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
        return None if self.norm_weight is None else Norm(self.norm_weight, self.norm_bias, self.norm_eps)

    def load(self) -> tuple[ModuleType, Operand]:
        """The kernels' module, and the operand."""
        return dispatch.load("norm_linear", "triton"), Operand(self.matrix, self.column_sum, self.offset)


_ARGUMENTS = (
    "Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor matrix, Tensor? column_sum, Tensor? offset, "
    "float norm_eps"
)
torch.library.define("crate_kernels::norm_linear_forward", f"(Tensor x, {_ARGUMENTS}) -> (Tensor y, Tensor[] kept)")
torch.library.define(
    "crate_kernels::norm_linear_backward",
    f"(Tensor grad, Tensor x, Tensor[] kept, bool need_x, bool need_weights, {_ARGUMENTS}) -> (Tensor grad_x, "
    "Tensor grad_weight, Tensor grad_bias, Tensor grad_norm_weight, Tensor grad_norm_bias)",
)


@torch.library.impl("crate_kernels::norm_linear_forward", "CompositeExplicitAutograd")
@undisturbed
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    given = NormLinearArguments(*arguments)
    kernels, operand = given.load()
    y, stats = kernels.forward(x, operand, given.norm)
    return y, [] if stats is None else [stats]


@torch.library.impl("crate_kernels::norm_linear_backward", "CompositeExplicitAutograd")
@undisturbed
def _backward(
    grad: Tensor, x: Tensor, kept: list[Tensor], need_x: bool, need_weights: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    given = NormLinearArguments(*arguments)
    kernels, operand = given.load()
    of_forward = kept or (None, None)
    found = kernels.backward(grad, x, *of_forward, given.weight, operand, given.norm, need_x, need_weights)
    return tuple(map(or_empty, found, (x, *given[:4])))


@torch.library.register_fake("crate_kernels::norm_linear_forward")
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    given = NormLinearArguments(*arguments)
    stats = x.new_empty(2, x.shape[0], dtype=torch.float32)
    y = x.new_empty(x.shape[0], given.weight.shape[0], dtype=given.matrix.dtype)
    return y, [] if given.norm_weight is None else [stats]


@torch.library.register_fake("crate_kernels::norm_linear_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, kept: list[Tensor], need_x: bool, need_weights: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    given = NormLinearArguments(*arguments)
    return empty_gradient(x, need_x), *(empty_gradient(like, need_weights) for like in given[:4])


@register_flop_formula(torch.ops.crate_kernels.norm_linear_forward)
def _forward_flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.crate_kernels.norm_linear_backward)
def _backward_flops(
    grad: Any,
    x_shape: tuple[int, ...],
    kept: Any,
    need_x: bool,
    need_weights: bool,
    weight_shape: tuple[int, ...],
    *_: Any,
    **__: Any,
) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1] * (need_x + need_weights)
