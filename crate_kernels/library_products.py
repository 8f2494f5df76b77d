"""Products by PyTorch's own libraries: in the arithmetic, and by the library, that is fastest on this machine.

In float32 ``torch.mm`` goes to MKL. oneDNN, which PyTorch brings along too, takes 10 to 25% less time on an AMD CPU with AVX-512
where the first factor lies row by row (``benchmarks/NOTES.md``, round 14). Elsewhere nothing was measured, and MKL stays.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_kernels._ops import ops
from crate_kernels.cpu import CPU, arithmetic_dtype
from crate_kernels.definitions import register
from crate_kernels.dispatch import is_plain
from crate_kernels.dtypes import no_autocast
from crate_kernels.private_torch import HAS_ONEDNN_LINEAR, is_transformed, onednn_linear

ONEDNN_IS_FASTER = CPU.vendor == "AuthenticAMD" and "avx512f" in CPU.flags and HAS_ONEDNN_LINEAR


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` in x's dtype, computed in the dtype and by the library that is fastest. Differentiable.

    Where 16-bit tokens are multiplied in float32 they are kept for the backward as they came, and widened there again.
    """
    dtype = arithmetic_dtype(x)
    if is_plain(weight) and (_by_onednn(x) or (dtype != x.dtype and is_plain(x))):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return _Linear.apply(rows, weight, bias, dtype, x.dtype).view(*x.shape[:-1], weight.shape[0])
    # In no wider dtype than that of x: of such a product, autocast would round the backward's operands where that is inside it.
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices in one dtype. Like ``plus_product`` it has no gradient of its own: for use inside an operator."""
    return _onednn(a, b.t(), None) if _by_onednn(a) else torch.mm(a, b)


def plus_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * total + alpha * a b in memory of its own, as ``torch.addmm``; all in one dtype, and beta not zero."""
    if not _by_onednn(a):
        return torch.addmm(total, a, b, beta=beta, alpha=alpha)
    result = _onednn(a, b.t(), None)
    result = torch.add(total, result, alpha=alpha / beta, out=result)
    return result if beta == 1 else result.mul_(beta)


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 of factors in any floating dtype: products of 16-bit factors are exact, and so are not rounded."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _by_onednn(a: Tensor) -> bool:
    return (
        ONEDNN_IS_FASTER and is_plain(a) and a.device.type == "cpu" and a.dtype == torch.float32 and a.is_contiguous()
    )


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN takes any bias for contiguous, and any matrix for one of the two plain layouts: they are made so first."""
    if rows.numel() == 0:
        return F.linear(rows, weight, bias)
    if not weight.t().is_contiguous():
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return onednn_linear(rows, weight, bias)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn(rows, weight, bias) if _by_onednn(rows) else F.linear(rows, weight, bias)


register(
    "linear",
    _linear,
    fake=lambda rows, weight, bias: rows.new_empty(rows.shape[0], weight.shape[0]),
    flops=lambda rows, weight, bias: 2 * rows[0] * rows[1] * weight[0],
)


def _plainly(rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """``_Linear`` in PyTorch's own calls."""
    with no_autocast(rows):
        return F.linear(rows.to(dtype), weight.to(dtype), bias).to(out_dtype)


class _Linear(torch.autograd.Function):
    """rows weight^T + bias, computed in ``dtype``, returned in ``out_dtype``; its gradients, of any order, are such layers too.

    Rows and weight are kept as they came: casting them again takes less time than the product, and half the memory. What is to
    be transformed by ``torch.func`` never comes here; gradients that are take PyTorch's own product.
    """

    @staticmethod
    def forward(
        rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> Tensor:
        bias = None if bias is None else bias.to(dtype)
        return ops.linear(rows.to(dtype), weight.to(dtype), bias).to(out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows, weight, bias, ctx.dtype, _ = inputs
        ctx.dtypes = rows.dtype, weight.dtype, None if bias is None else bias.dtype
        needs = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs[1] else None, weight if needs[0] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        grad, (of_rows, of_weight, of_bias) = grad.to(ctx.dtype), ctx.dtypes
        multiply = _plainly if is_transformed() else _Linear.apply
        grad_rows = multiply(grad, weight.t(), None, ctx.dtype, of_rows) if needs[0] else None
        grad_weight = multiply(grad.t(), rows.t(), None, ctx.dtype, of_weight) if needs[1] else None
        return grad_rows, grad_weight, grad.sum(0).to(of_bias) if needs[2] else None, None, None
