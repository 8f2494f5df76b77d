"""Products by the libraries inside PyTorch, in the dtype and by the library that are fastest on this machine.

In float32 ``torch.mm`` uses MKL. PyTorch contains oneDNN too, which takes 10 to 25% less time on an AMD CPU with AVX-512 if the
first factor is contiguous (``benchmarks/NOTES.md``, round 14). On other CPUs nothing was measured, and MKL is used.
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
    """``x weight^T + bias`` in x's dtype, computed in the dtype and by the library that are fastest. Differentiable.

    Where 16-bit tokens are multiplied in float32, the backward keeps the 16-bit tokens and casts them again.
    """
    dtype = arithmetic_dtype(x)
    if is_plain(weight) and (_by_onednn(x) or (dtype != x.dtype and is_plain(x))):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return _Linear.apply(rows, weight, bias, dtype, x.dtype).view(*x.shape[:-1], weight.shape[0])
    # In the dtype of x and not in a wider one: a backward that runs inside autocast would round the operands of a wider product.
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices in one dtype. Like ``plus_product`` it is not differentiable: for use inside operators."""
    return _onednn(a, b.t(), None) if _by_onednn(a) else torch.mm(a, b)


def plus_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * total + alpha * a b as a new tensor, as ``torch.addmm``; all are in one dtype, and beta is not zero."""
    if not _by_onednn(a):
        return torch.addmm(total, a, b, beta=beta, alpha=alpha)
    result = _onednn(a, b.t(), None)
    result = torch.add(total, result, alpha=alpha / beta, out=result)
    return result if beta == 1 else result.mul_(beta)


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, for factors in any floating dtype. The result is not rounded to the dtype of 16-bit factors."""
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
    """``rows weight^T + bias`` by oneDNN. It reads a bias as contiguous, and a weight as contiguous or the transpose of that;
    others are copied first, as it would read them wrongly."""
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
    """rows weight^T + bias, computed in ``dtype``, returned in ``out_dtype``. Its backward is made of such products, too, so that
    it has derivatives of any order.

    Rows and weight are kept as they came: to keep a cast of them takes more memory, and to cast them again takes less time than
    the product. Under a transform of ``torch.func`` the forward is never called, and the backward calls ``F.linear``.
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
        grad, (rows_dtype, weight_dtype, bias_dtype) = grad.to(ctx.dtype), ctx.dtypes
        multiply = _plainly if is_transformed() else _Linear.apply
        grad_rows = multiply(grad, weight.t(), None, ctx.dtype, rows_dtype) if needs[0] else None
        grad_weight = multiply(grad.t(), rows.t(), None, ctx.dtype, weight_dtype) if needs[1] else None
        return grad_rows, grad_weight, grad.sum(0).to(bias_dtype) if needs[2] else None, None, None
