"""Products by PyTorch's own libraries: in the arithmetic, and by the library, that is fastest on this machine.

In float32 ``torch.mm`` goes to MKL. oneDNN, which PyTorch brings along too, takes 10 to 25% less time on an AMD CPU with AVX-512
where the first factor lies row by row (``benchmarks/NOTES.md``, round 14). Elsewhere nothing was measured, and MKL stays.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from crate_kernels.precision import CPU, arithmetic_dtype, undisturbed

ONEDNN_IS_FASTER = CPU.vendor == "AuthenticAMD" and "avx512f" in CPU.flags and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` in x's dtype, with the weights cast to it, computed where it is fastest. Differentiable."""
    dtype = arithmetic_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    rows, weight = x.to(dtype), weight.to(dtype)
    if _by_onednn(rows):
        rows = rows.view(x.shape[:-1].numel(), x.shape[-1])
        result = _Linear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
    else:
        result = F.linear(rows, weight, bias)
    return result.to(x.dtype)


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
    plain = type(a) in (Tensor, Parameter)  # what a subclass does, it knows of PyTorch's own operators
    return ONEDNN_IS_FASTER and plain and a.device.type == "cpu" and a.dtype == torch.float32 and a.is_contiguous()


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer that the inductor calls too. It takes a bias for packed, and a matrix for one of the two plain layouts."""
    if rows.numel() == 0:
        return F.linear(rows, weight, bias)
    if not weight.t().is_contiguous():
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


torch.library.define("crate_kernels::linear", "(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("crate_kernels::linear", "CPU")
@undisturbed
def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn(rows, weight, bias) if _by_onednn(rows) else F.linear(rows, weight, bias)


@torch.library.register_fake("crate_kernels::linear")
def _linear_fake(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.crate_kernels.linear)
def _linear_flops(rows_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * rows_shape[0] * rows_shape[1] * weight_shape[0]


class _Linear(torch.autograd.Function):
    """rows weight^T + bias; its gradients, of any order, are such layers too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.crate_kernels.linear(rows, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        grad_rows = _Linear.apply(grad, weight.t(), None) if needs[0] else None
        grad_weight = _Linear.apply(grad.t(), rows.t(), None) if needs[1] else None
        return grad_rows, grad_weight, grad.sum(0) if needs[2] else None
