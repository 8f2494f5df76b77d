"""The overcomplete step as kernels: one launch for each of its four products, with the threshold or skip that follows it.

    z1 = relu(x (eta D) - eta*lambda)        r = x - z1 D^T
    z2 = relu(z1 + r (eta D) - eta*lambda)   out = skip + z2 D1^T

Fewer products would cost more: D^T D [codes, codes] would replace the two in the middle by one that is codes / width times as
large as either. The backward keeps x, z1 and z2, whose zeros are the masks, and computes r again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.products.launchers import GradientRows, gradient_rows, input_gradient, project, weight_gradient
from crate_kernels.products.norm_folding import Operand


class Step(NamedTuple):
    """dictionary D and out_dictionary D1 [width, codes] (D itself if None); eta and lambda, 0-dim, on the host or the device."""

    dictionary: Tensor
    out_dictionary: Tensor | None
    step_size: Tensor
    lambd: Tensor

    @property
    def threshold(self) -> Tensor:
        """eta * lambda, in float32 whatever their dtype: a rounding error in it would be the same in every code, and add up."""
        return self.step_size.float() * self.lambd.float()

    def descent(self, dtype: torch.dtype) -> Operand:
        """The operand of eta D, for a product in ``dtype``."""
        return _operand(self.dictionary.float() * self.step_size, dtype)

    def output(self, dtype: torch.dtype) -> Operand:
        """The operand of D1^T, for a product in ``dtype``."""
        matrix = self.dictionary if self.out_dictionary is None else self.out_dictionary
        return _operand(matrix.t(), dtype)


class Needs(NamedTuple):
    """Which gradients are asked for; ``numbers`` stands for eta and lambda."""

    x: bool
    dictionary: bool
    out_dictionary: bool
    numbers: bool


def forward(
    x: Tensor, weights: Step, skip: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """out [tokens, width] in ``out_dtype``, and z1 and z2 [tokens, codes] in ``dtype``."""
    descent, threshold = weights.descent(dtype), weights.threshold
    z1 = project(x, descent, dtype, threshold=threshold).out
    z2 = project(_unexplained(x, z1, weights), descent, dtype, skip=z1, threshold=threshold).out
    out = project(z2, weights.output(dtype), out_dtype, skip=skip).out
    return out, z1, z2


def backward(grad: Tensor, x: Tensor, z1: Tensor, z2: Tensor, weights: Step, needs: Needs) -> tuple[Tensor | None, ...]:
    """dx in x's dtype, and dD, dD1, deta and dlambda in float32, from grad [tokens, width]; None for those not asked for.

    With g1 and g2 the gradients of the two thresholds' inputs,

        g2 = (grad D1) where z2      dr = g2 (eta D)^T      g1 = (g2 - dr D) where z1      dx = dr + g1 (eta D)^T
        dD1 = grad^T z2              dD = eta (x^T g1 + r^T g2) - dr^T z1
        dlambda = -eta sum(g1 + g2)  deta = sum(g1 z1 + g2 (z2 - z1)) / eta

    deta is so because x D - lambda is z1 / eta where z1 is not zero, and r D - lambda is (z2 - z1) / eta where z2 is not.
    """
    dtype, eta = z1.dtype, weights.step_size
    coupled = weights.out_dictionary is None
    grad_x = grad_dictionary = grad_out = grad_step_size = grad_lambd = None
    if needs.out_dictionary or (coupled and needs.dictionary):
        grad_out = weight_gradient(grad, z2)
    if needs.x or needs.dictionary or needs.numbers:
        descent = weights.descent(dtype)
        # hardshrink's backward keeps the gradient where its input is not zero: the mask, in one pass.
        grad_z2 = _through(grad, weights.output(dtype), dtype)
        g2 = torch.ops.aten.hardshrink_backward(grad_z2, z2, 0.0)
        grad_r = _through(g2, descent, dtype)
        grad_z1 = project(grad_r, _operand(weights.dictionary, dtype), dtype, skip=g2, negate=True).out
        g1 = GradientRows(torch.ops.aten.hardshrink_backward(grad_z1, z1, 0.0))
        if needs.x:
            grad_x, _ = input_gradient(g1, descent, x.dtype, extra=grad_r)
        if needs.dictionary:
            through_second = weight_gradient(_unexplained(x, z1, weights), g2)
            grad_dictionary = (weight_gradient(x, g1.g) + through_second) * eta
            grad_dictionary -= weight_gradient(grad_r, z1)
        if needs.numbers:
            gained = z2.float() - z1
            grad_step_size = ((g1.g.float() * z1).sum() + (g2 * gained).sum()) / eta
            grad_lambd = -eta * (g1.g.float().sum() + g2.float().sum())
    if coupled and grad_dictionary is not None and grad_out is not None:
        grad_dictionary, grad_out = grad_dictionary + grad_out, None
    return grad_x, grad_dictionary, grad_out, grad_step_size, grad_lambd


def _through(grad: Tensor, operand: Operand, dtype: torch.dtype) -> Tensor:
    """grad B^T in ``dtype``: the gradient of what was multiplied by B."""
    return input_gradient(gradient_rows(grad, None, operand, need_column=False), operand, dtype)[0]


def _operand(matrix: Tensor, dtype: torch.dtype) -> Operand:
    return Operand(matrix.to(dtype), None, None)


def _unexplained(x: Tensor, z1: Tensor, weights: Step) -> Tensor:
    """r = x - z1 D^T, what the first code does not explain, in the dtype of the products."""
    return project(z1, _operand(weights.dictionary.t(), z1.dtype), z1.dtype, skip=x, negate=True).out
