"""ISTA as kernels: one large product forward and two backward, LayerNorm and threshold included.

With G = W - W^T W the sparse step is ``y = T(LN(x) + eta * LN(x) G - eta*lambda)``. Where tokens outnumber the width,
``eta * G`` is formed once and the tokens are multiplied by it; elsewhere they are multiplied by ``W^T`` and then by
``eta * W``, and a LayerNorm has been applied before. The identity never enters a 16-bit operand: x is added in float32 to the
float32 accumulator. y is the only mask the backward needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.ista.form import through_combination
from crate_kernels.matmul import float32_product
from crate_kernels.products.operand import MatrixGradient, Norm, Operand, gradient
from crate_kernels.products.preparation import combine, prepare
from crate_kernels.products.triton import gradient_rows, input_gradient, project, weight_gradient


class Step(NamedTuple):
    """eta and lambda, 0-dim tensors on the host or on the device, and which threshold."""

    step_size: Tensor
    lambd: Tensor
    soft: bool

    @property
    def threshold(self) -> Tensor:
        return self.step_size * self.lambd


def prepared(
    weight: Tensor, combined: Tensor | None, step: Step, norm: Norm | None, dtype: torch.dtype
) -> tuple[Tensor, Operand]:
    """G, which may have been made before as ``combined``, and the operand of eta * G for a product in ``dtype``."""
    if combined is None:
        return combine(weight, norm, step.step_size, dtype)
    return combined, prepare(combined, None, norm, dtype, scale=step.step_size)


def forward(
    x: Tensor, operand: Operand, norm: Norm | None, step: Step, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """y [tokens, width] in ``out_dtype`` and, with a LayerNorm, mean and rstd of each token."""
    return project(
        x, operand, out_dtype, norm=norm, skip=x, skip_norm=norm is not None, threshold=step.threshold, soft=step.soft
    )


def backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    combined: Tensor | None,
    operand: Operand,
    stats: Tensor | None,
    norm: Norm | None,
    step: Step,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, MatrixGradient | None]:
    """dx [tokens, width] in x's dtype, and the gradients of W and the LayerNorm, float32. With g = grad_y where y is not zero,

    dx = LN'(g + g (eta G)^T)      dW = dG - W (dG + dG^T), dG = eta * dB of B = eta * G

    ``combined`` is G, needed for the gradients of the LayerNorm; operand and stats are the forward's.
    """
    grad_x = grads = None
    dtype = operand.matrix.dtype
    form = dict(y=y, threshold=step.threshold, soft=step.soft, norm=norm, stats=stats, skip=True)
    rows = gradient_rows(
        grad_y, x, dtype, operand=operand, **form,
        need_input=need_x, need_weight=need_weight, need_column=norm is not None,
    )  # fmt: skip
    if need_x:
        grad_x = input_gradient(grad_y, operand, x.dtype, **form, x=x, rows=rows)
    if need_weight:
        product, column = weight_gradient(x, grad_y, dtype, rows=rows)
        if norm is None:
            grads = MatrixGradient(through_combination(product * step.step_size, weight.float()), None, None, None)
        else:
            found = gradient(product, column, combined * step.step_size, None, norm)
            # LN(x) was added to the product as well: its weight and bias meet the gradient there, too.
            grads = MatrixGradient(
                through_combination(found.matrix * step.step_size, weight.float()),
                None,
                found.norm_weight + product.diagonal(),
                None if norm.bias is None else found.norm_bias + column,
            )
    return grad_x, grads


def forward_two_products(x: Tensor, weight: Tensor, step: Step, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """y by r = x - x W^T and then x + r (eta W): less work where tokens are fewer than the width."""
    residual = project(x, _plain(weight.t(), dtype), dtype, skip=x, negate=True)[0]
    scaled = prepare(weight, None, None, dtype, scale=step.step_size)
    return project(residual, scaled, out_dtype, skip=x, threshold=step.threshold, soft=step.soft)[0]


def backward_two_products(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    step: Step,
    dtype: torch.dtype,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW of ``forward_two_products``:

    dr = g (eta W)^T      dx = g + dr - dr W      dW = eta * r^T g - dr^T x, r computed again
    """
    scaled = prepare(weight, None, None, dtype, scale=step.step_size)
    # Kept in float32 up to the last product: there are few tokens here, and one rounding less.
    masked = dict(y=y, threshold=step.threshold, soft=step.soft)
    masked["rows"] = gradient_rows(grad_y, None, dtype, **masked, need_weight=False)
    total = input_gradient(grad_y, scaled, torch.float32, **masked, skip=True)
    grad_residual = input_gradient(grad_y, scaled, dtype, **masked)
    grad_x = grad_weight = None
    if need_x:
        grad_x, _ = project(grad_residual, _plain(weight, dtype), x.dtype, skip=total, negate=True)
    if need_weight:
        residual = project(x, _plain(weight.t(), dtype), dtype, skip=x, negate=True)[0]
        grad_weight = float32_product(residual.t(), masked["rows"].g) * step.step_size
        grad_weight -= weight_gradient(grad_residual, x, dtype, need_column=False)[0]
    return grad_x, grad_weight


def _plain(matrix: Tensor, dtype: torch.dtype) -> Operand:
    return prepare(matrix, None, None, dtype)
