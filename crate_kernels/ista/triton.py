"""ISTA as kernels: one large product forward and two backward, LayerNorm and threshold included.

With G = W - W^T W the sparse step is ``y = T(LN(x) + eta * LN(x) G)``, T the threshold at eta * lambda. If there are more tokens
than features, ``eta * G`` is formed once and the tokens are multiplied by it. Else they are multiplied by ``W^T`` and then by
``eta * W``, and the caller has applied the LayerNorm. x is not multiplied by the identity in 16 bits: it is added in float32 to
the float32 product. y tells the backward what passed the threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.ista.form import through_combined
from crate_kernels.library_products import float32_product
from crate_kernels.products.launchers import (
    PartMoments,
    gradient_rows,
    gradients,
    input_gradient,
    project,
    weight_gradient,
)
from crate_kernels.products.norm_folding import Norm, Operand
from crate_kernels.products.preparation import matrix_gradients


class Step(NamedTuple):
    """eta and lambda, 0-dim tensors on the host or on the device, and whether the threshold is the soft one."""

    step_size: Tensor
    lambd: Tensor
    soft: bool

    @property
    def threshold(self) -> Tensor:
        return self.step_size * self.lambd


def forward(
    x: Tensor, operand: Operand, norm: Norm | None, step: Step, out_dtype: torch.dtype, parts: PartMoments | None = None
) -> tuple[Tensor, Tensor | None]:
    """y [tokens, width] in ``out_dtype`` and, with a LayerNorm, mean and rstd of each token, made of their parts if those are
    known."""
    y, moments, _ = project(
        x, operand, out_dtype, norm=norm, moments=parts, skip=x, skip_norm=norm is not None, threshold=step.threshold,
        soft=step.soft,
    )  # fmt: skip
    return y, moments


def backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    dictionary: Tensor,
    combined: Tensor,
    operand: Operand,
    moments: Tensor | None,
    norm: Norm | None,
    step: Step,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx [tokens, width] in x's dtype, and the gradients of W and of the LayerNorm's weight and bias.

    With g = grad_y where y is not zero, and zero elsewhere,

    dx = LN'(g + g (eta G)^T)      dW = dG - W (dG + dG^T), dG = eta * dB of B = eta * G

    ``combined`` is G; operand and moments are the forward's.
    """
    found = gradients(
        grad_y, x, operand, x.dtype, y=y, threshold=step.threshold, soft=step.soft, norm=norm, moments=moments, skip=True,
        need_x=need_x, need_matrix=need_weights, need_column=need_weights and norm is not None,
    )  # fmt: skip
    if found.matrix is None:
        return found.x, None, None, None
    weight = dictionary.float()
    if norm is None:
        return found.x, through_combined(found.matrix * step.step_size, weight), None, None
    grads = matrix_gradients(found, combined, norm, step.step_size, skip=True, symmetric=True)
    return found.x, through_combined(grads.matrix, weight, both=grads.symmetric), grads.gamma, grads.beta


def forward_two_products(
    x: Tensor, dictionary: Tensor, step: Step, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """y = T(x + r (eta W)) with r = x - x W^T: less work if there are fewer tokens than features."""
    scaled = _operand(dictionary.float() * step.step_size, dtype)
    return project(
        _residual(x, dictionary, dtype), scaled, out_dtype, skip=x, threshold=step.threshold, soft=step.soft
    ).out


def backward_two_products(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    dictionary: Tensor,
    step: Step,
    dtype: torch.dtype,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW of ``forward_two_products``:

    dr = g (eta W)^T      dx = g + dr - dr W      dW = eta * r^T g - dr^T x

    where r is computed again.
    """
    scaled = _operand(dictionary.float() * step.step_size, dtype)
    rows = gradient_rows(grad_y, None, scaled, y=y, threshold=step.threshold, soft=step.soft, need_column=False)
    grad_x = grad_weight = None
    grad_residual, _ = input_gradient(rows, scaled, dtype)
    if need_x:
        # In float32 up to the last product: that saves a rounding, and costs little since there are few tokens here.
        total, _ = input_gradient(rows, scaled, torch.float32, skip=grad_y, mask=y)
        grad_x = project(grad_residual, _operand(dictionary, dtype), x.dtype, skip=total, negate=True).out
    if need_weights:
        grad_weight = float32_product(_residual(x, dictionary, dtype).t(), rows.g) * step.step_size
        grad_weight -= weight_gradient(grad_residual, x.to(dtype))
    return grad_x, grad_weight


def _residual(x: Tensor, dictionary: Tensor, dtype: torch.dtype) -> Tensor:
    """r = x - x W^T, what the dictionary does not explain."""
    return project(x, _operand(dictionary.t(), dtype), dtype, skip=x, negate=True).out


def _operand(matrix: Tensor, dtype: torch.dtype) -> Operand:
    return Operand(matrix.to(dtype), None, None)
