"""PyTorch operators of ISTA: schemas, shapes, FLOP counts. Imports torch only.

``x`` is the stream, added in float32 or better; ``operand`` is x in the dtype of the product (the same tensor where the two
agree). ``matrix`` is what the tokens, or their residual, were multiplied with: the forward made it, the backward needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels import dispatch
from crate_kernels.ista.form import one_product
from crate_kernels.precision import undisturbed

torch.library.define(
    "crate_kernels::ista_forward",
    "(Tensor x, Tensor operand, Tensor weight, float step_size, float lambd, bool soft, str implementation)"
    " -> (Tensor y, Tensor matrix)",
)
torch.library.define(
    "crate_kernels::ista_backward",
    "(Tensor grad_y, Tensor operand, Tensor weight, Tensor y, Tensor matrix, float step_size, bool need_x,"
    " bool need_weight, str implementation) -> (Tensor grad_x, Tensor grad_weight)",
)


@torch.library.impl("crate_kernels::ista_forward", "CompositeExplicitAutograd")
@undisturbed
def _forward(
    x: Tensor, operand: Tensor, weight: Tensor, step_size: float, lambd: float, soft: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    return dispatch.load("ista", implementation).forward(x, operand, weight, step_size, lambd, soft)


@torch.library.impl("crate_kernels::ista_backward", "CompositeExplicitAutograd")
@undisturbed
def _backward(
    grad_y: Tensor,
    operand: Tensor,
    weight: Tensor,
    y: Tensor,
    matrix: Tensor,
    step_size: float,
    need_x: bool,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = dispatch.load("ista", implementation).backward(
        grad_y, operand, weight, y, matrix, step_size, need_x, need_weight
    )
    # A schema cannot return an optional tensor: a gradient nobody asked for is an empty one.
    return (y.new_empty(0) if grad_x is None else grad_x), (weight.new_empty(0) if grad_weight is None else grad_weight)


@torch.library.register_fake("crate_kernels::ista_forward")
def _forward_fake(x: Tensor, operand: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), operand.new_empty(weight.shape)


@torch.library.register_fake("crate_kernels::ista_backward")
def _backward_fake(
    grad_y: Tensor,
    operand: Tensor,
    weight: Tensor,
    y: Tensor,
    matrix: Tensor,
    step_size: float,
    need_x: bool,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


@register_flop_formula(torch.ops.crate_kernels.ista_forward)
def _forward_flops(x_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, width = x_shape
    large, small = 2 * tokens * width**2, 2 * width**3
    return large + small if one_product(tokens, width) else 2 * large


@register_flop_formula(torch.ops.crate_kernels.ista_backward)
def _backward_flops(
    grad_shape: tuple[int, ...],
    operand: Any,
    weight: Any,
    y: Any,
    matrix: Any,
    step_size: float,
    need_x: bool,
    need_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    tokens, width = grad_shape
    large, small = 2 * tokens * width**2, 2 * width**3
    if one_product(tokens, width):
        return large * need_x + (large + small) * need_weight
    # dr serves both; the weight's gradient computes the residual again and multiplies twice.
    return large * (need_x or need_weight) + large * need_x + 3 * large * need_weight
