"""ISTA in standard PyTorch calls: one large product forward and two backward where tokens outnumber the width.

With G = W - W^T W, x W - x W^T W is x G, and G costs width^3 whatever the number of tokens (``form.one_product``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_kernels.ista.form import one_product
from crate_kernels.precision import arithmetic_dtype


def forward(
    x: Tensor, operand: Tensor, weight: Tensor, step_size: float, lambd: float, soft: bool
) -> tuple[Tensor, Tensor]:
    """y = T(x + eta (x W - x W^T W)), and the matrix it took. Shapes as in ``op``."""
    if one_product(*x.shape):
        factor, matrix = operand, _combination(weight, operand, step_size)
    else:
        factor, matrix = _residual(operand, weight), (weight * step_size).contiguous()
    matrix = matrix.to(operand.dtype)
    # The relu's threshold is taken off x, in the copy that the product is then added to: two passes over y fewer.
    code = _add_product_(_at_least_float32(x) - (0.0 if soft else step_size * lambd), factor, matrix, 1, 1)
    code = F.softshrink(code, step_size * lambd) if soft else code.relu_()
    return code.to(x.dtype), matrix


def backward(
    grad_y: Tensor,
    operand: Tensor,
    weight: Tensor,
    y: Tensor,
    matrix: Tensor,
    step_size: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients asked for, in x (y's dtype) and W (W's dtype); None for the others."""
    # hardshrink's backward keeps the gradient where its input is not zero: the mask of both thresholds, in one pass.
    grad = torch.ops.aten.hardshrink_backward(grad_y, y, 0.0)
    grad_operand = grad.to(operand.dtype)
    grad_x = grad_weight = None
    if one_product(*operand.shape):
        if need_x:
            grad_x = _product(grad_operand, matrix.t()).add_(grad).to(y.dtype)
        if need_weight:
            grad_matrix = _product(operand.t(), grad_operand)
            grad_weight = _through_combination(grad_matrix, weight, operand, step_size).to(weight.dtype)
        return grad_x, grad_weight
    residual_sum = _product(grad_operand, matrix.t())
    grad_residual = residual_sum.to(operand.dtype)
    if need_weight:
        grad_weight = _product(_residual(operand, weight).t(), grad_operand)
        grad_weight = _add_product_(grad_weight, grad_residual.t(), operand, step_size, -1).to(weight.dtype)
    if need_x:
        grad_x = _add_product_(residual_sum + grad, grad_residual, weight.to(operand.dtype), 1, -1).to(y.dtype)
    return grad_x, grad_weight


def _residual(operand: Tensor, weight: Tensor) -> Tensor:
    """r = x - x W^T: what the dictionary leaves unexplained."""
    product = _product(operand, weight.to(operand.dtype).t())
    return torch.sub(operand, product, out=product).to(operand.dtype)


def _combination(weight: Tensor, operand: Tensor, step_size: float) -> Tensor:
    """eta (W - W^T W), of at least float32; its product in the arithmetic of the operand's."""
    factor = weight.to(arithmetic_dtype(operand))
    return _add_product_((_at_least_float32(weight) * step_size).contiguous(), factor.t(), factor, 1, -step_size)


def _through_combination(grad_matrix: Tensor, weight: Tensor, operand: Tensor, step_size: float) -> Tensor:
    """dW of that matrix, from its gradient: eta (dG - W (dG + dG^T))."""
    factor = weight.to(arithmetic_dtype(operand))
    symmetric = (grad_matrix + grad_matrix.t()).to(factor.dtype)
    return _add_product_(grad_matrix, factor, symmetric, step_size, -step_size)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, in the arithmetic that is fastest; a fresh tensor of at least float32."""
    dtype = arithmetic_dtype(a)
    return _at_least_float32(torch.mm(a.to(dtype), b.to(dtype)))


def _add_product_(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """beta total + alpha a b, written to ``total``, which is of at least float32."""
    dtype = arithmetic_dtype(a)
    if dtype == total.dtype:
        return total.addmm_(a.to(dtype), b.to(dtype), beta=beta, alpha=alpha)
    if beta != 1:
        total.mul_(beta)
    return total.add_(torch.mm(a, b), alpha=alpha)
