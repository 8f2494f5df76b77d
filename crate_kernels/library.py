"""Products by PyTorch's own libraries: in the arithmetic, and by the library, that is fastest on this machine.

In float32 ``torch.mm`` goes to MKL, which makes no use of AVX-512 on AMD's CPUs. oneDNN, which PyTorch brings along, takes 10 to
25% less time there where the first factor lies row by row (``benchmarks/NOTES.md``). Elsewhere ``torch.mm`` it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels.precision import CPU, arithmetic_dtype, undisturbed

ONEDNN_IS_FASTER = CPU.vendor == "AuthenticAMD" and "avx512f" in CPU.flags and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` in x's dtype, with the weights cast to it, computed where it is fastest. Differentiable."""
    dtype = arithmetic_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    rows, weight = x.to(dtype), weight.to(dtype)
    if _by_onednn(rows):
        result = _Product.apply(rows.view(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])
    else:
        result = F.linear(rows, weight, bias)
    return result.to(x.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices in one dtype. Like ``plus_product``, for use inside an operator: autograd sees neither."""
    return _onednn(a, b, None) if _by_onednn(a) else torch.mm(a, b)


def plus_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * total + alpha * a b in memory of its own, as ``torch.addmm``; all in one dtype."""
    if not _by_onednn(a):
        return torch.addmm(total, a, b, beta=beta, alpha=alpha)
    result = _onednn(a, b, None)
    result = torch.add(total, result, alpha=alpha / beta, out=result)
    return result if beta == 1 else result.mul_(beta)


def _by_onednn(a: Tensor) -> bool:
    fits = a.device.type == "cpu" and a.dtype == torch.float32 and a.is_contiguous() and a.numel() > 0
    return ONEDNN_IS_FASTER and fits


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer that the inductor calls too; its weight is [out, in], of any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


torch.library.define("crate_kernels::product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl("crate_kernels::product", "CPU")
@undisturbed
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if _by_onednn(a):
        return _onednn(a, b, bias)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


@torch.library.register_fake("crate_kernels::product")
def _product_fake(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@register_flop_formula(torch.ops.crate_kernels.product)
def _product_flops(a_shape: tuple[int, ...], b_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


class _Product(torch.autograd.Function):
    """a b + bias, as often differentiable as need be: the gradients are such products too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.ops.crate_kernels.product(a, b, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), needs = ctx.saved_tensors, ctx.needs_input_grad
        grad_a = _Product.apply(grad, b.t(), None) if needs[0] else None
        grad_b = _Product.apply(a.t(), grad, None) if needs[1] else None
        return grad_a, grad_b, grad.sum(0) if needs[2] else None
