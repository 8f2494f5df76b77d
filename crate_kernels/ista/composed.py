"""ISTA in standard PyTorch calls: one large product forward and two backward, if there are more tokens than features.

With G = W - W^T W, x W - x W^T W is x G, and G costs the same for any number of tokens (``form.one_product``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_kernels import library_products
from crate_kernels.cpu import arithmetic_dtype
from crate_kernels.ista.form import combined_of, one_product, through_combined
from crate_kernels.layer_norm import norm_operands
from crate_kernels.products.norm_folding import Norm


def forward(
    x: Tensor,
    norm: Norm | None,
    out_dtype: torch.dtype,
    dictionary: Tensor,
    combined: Tensor | None,
    step_size: float,
    lambd: float,
    soft: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """y = T(x + eta (x W - x W^T W)), where x is normalised first if there is a norm; and what ``op`` says is kept."""
    if norm is not None:
        x = _normalised(norm, x, out_dtype)[0]
    operand = x.to(dtype)
    one = combined is not None or one_product(*x.shape)
    factor = operand if one else _residual(operand, dictionary)
    if one and combined is None:
        matrix = combined_of(dictionary.to(arithmetic_dtype(operand))).to(dtype)
    else:  # a copy: an operator must not return one of its arguments
        matrix = (dictionary if combined is None else combined).to(dtype, copy=True).contiguous()
    update = _product(factor, matrix)
    update = update.to(torch.promote_types(x.dtype, update.dtype))
    if soft:
        code = F.softshrink(torch.add(_at_least_float32(x), update, alpha=step_size), step_size * lambd)
    else:  # lambda is subtracted from the update, which is small: so in 16 bits only the last sum is rounded coarsely
        code = torch.add(x, update.sub_(lambd), alpha=step_size, out=update).relu_()
    return code.to(x.dtype), [matrix] if operand is x or norm is not None else [matrix, operand]


def backward(
    grad_y: Tensor,
    x: Tensor,
    norm: Norm | None,
    dictionary: Tensor,
    combined: Tensor | None,
    y: Tensor,
    matrix: Tensor,
    step_size: float,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients asked for: of x, of W and, with that of W, of the LayerNorm's weight and bias; None for the others."""
    operand = x.to(matrix.dtype)
    if norm is not None:
        normalised, *moments = _normalised(norm, x, y.dtype)
        operand = normalised.to(matrix.dtype)
    need_operand = need_x or (norm is not None and need_weights)
    # hardshrink's backward keeps the gradient where its input is not zero: the mask of both thresholds, in one pass.
    grad = torch.ops.aten.hardshrink_backward(grad_y, y, 0.0)
    grad_operand = grad.to(operand.dtype)
    grad_x = grad_dictionary = None
    if combined is not None or one_product(*operand.shape):
        if need_operand:
            grad_x = _plus_product(grad, grad_operand, matrix.t(), step_size)
        if need_weights:
            grad_combined = _product(operand.t(), grad_operand)
            grad_dictionary = through_combined(grad_combined, dictionary.to(grad_combined.dtype), step_size)
    else:
        residual_sum = _at_least_float32(_product(grad_operand, matrix.t())) * step_size
        grad_residual = residual_sum.to(operand.dtype)
        if need_weights:
            through_last = _product(_residual(operand, dictionary).t(), grad_operand)
            through_residual = _product(-grad_residual.t(), operand)
            # Scaled and added in one pass: both are as large as the dictionary, and that is larger than all tokens here.
            grad_dictionary = _at_least_float32(through_residual).add_(through_last, alpha=step_size)
        if need_operand:
            grad_x = _plus_product(residual_sum + grad, grad_residual, matrix, -1)
    grad_x = None if grad_x is None else grad_x.to(y.dtype)
    grad_dictionary = None if grad_dictionary is None else grad_dictionary.to(dictionary.dtype)
    if norm is None or grad_x is None:
        return grad_x, grad_dictionary, None, None
    tokens, gamma, beta = norm_operands(x, norm.weight, norm.bias, y.dtype)
    needs = [need_x, need_weights, need_weights and beta is not None]
    grad_x, *grads_of_norm = torch.ops.aten.native_layer_norm_backward(
        grad_x, tokens, x.shape[-1:], *moments, gamma, beta, needs
    )
    return grad_x, grad_dictionary, *grads_of_norm


def _normalised(norm: Norm, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LN(x) in ``dtype``, and mean and rstd of each token."""
    x, weight, bias = norm_operands(x, norm.weight, norm.bias, dtype)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def _residual(operand: Tensor, dictionary: Tensor) -> Tensor:
    """r = x - x W^T, what the dictionary does not explain."""
    return (operand - _product(operand, dictionary.to(operand.dtype).t())).to(operand.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, computed and returned in the dtype that is fastest."""
    dtype = arithmetic_dtype(a)
    return library_products.product(a.to(dtype), b.to(dtype))


def _plus_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1) -> Tensor:
    """total + factor * a b, as a new tensor. It is rounded once, to the dtype of ``total``, if products are fast in that dtype;
    else it is in at least float32."""
    if total.dtype == arithmetic_dtype(a):
        return library_products.plus_product(total, a.to(total.dtype), b.to(total.dtype), alpha=factor)
    # Cast here, so that the sum can be written over the update: torch.add would cast into memory of its own.
    total, update = _at_least_float32(total), _at_least_float32(_product(a, b))
    return torch.add(total, update, alpha=factor, out=update)
