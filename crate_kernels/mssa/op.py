"""PyTorch operators of MSSA on the Triton path: schemas, shapes, FLOP counts. Imports no Triton.

``kept`` is what the backward needs besides x: w and attention's output [batch * tokens, inner] in the dtype of the products, the
log-sum-exp [batch, heads, tokens] and, with a LayerNorm, mean and rstd [2, batch * tokens], both float32. With ``recompute`` it
is mean and rstd alone. The composed path has no operator of its own: it calls PyTorch's products and the operator of attention.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from crate_kernels import dispatch
from crate_kernels.definitions import empty_gradients, or_empty, register
from crate_kernels.private_torch import unsafe_view
from crate_kernels.products.norm_folding import Norm, Operand, as_norm
from crate_kernels.shared_attention.mask import Mask
from crate_kernels.shared_attention.op import product


class MSSAArguments(NamedTuple):
    """What both operators take last, in the order of their schemas: weights, the operands made of them, settings."""

    qkv_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    qkv_matrix: Tensor
    qkv_column_sum: Tensor | None
    qkv_offset: Tensor | None
    out_matrix: Tensor
    out_offset: Tensor | None
    norm_eps: float
    skip_is_x: bool  # the gradient of x then includes that of the skip
    subtract: bool
    num_heads: int
    scale: float
    recompute: bool
    is_causal: bool  # from here on as in Mask
    window: int | None
    lengths: Tensor | None
    spans: Tensor | None
    key_mask: Tensor | None

    @property
    def norm(self) -> Norm | None:
        return as_norm(self.norm_weight, self.norm_bias, self.norm_eps)

    def load(self) -> tuple[ModuleType, tuple[Any, ...]]:
        """The kernels' module, and what its functions take after x: norm, both operands and ``Form``."""
        kernels = dispatch.load("mssa", "triton")
        mask = Mask(self.is_causal, self.window, self.lengths, self.spans, self.key_mask)
        form = kernels.Form(self.num_heads, self.scale, self.subtract, mask)
        qkv = Operand(self.qkv_matrix, self.qkv_column_sum, self.qkv_offset)
        return kernels, (self.norm, qkv, Operand(self.out_matrix, None, self.out_offset), form)


def forward(
    x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, given: MSSAArguments
) -> tuple[Tensor, list[Tensor]]:
    return forward_in_layer(x, skip, out_dtype, given)[:2]


def forward_in_layer(
    x: Tensor,
    skip: Tensor | None,
    out_dtype: torch.dtype,
    given: MSSAArguments,
    parts: Any = None,
    parts_for: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor], Any]:
    """``forward`` from the moments of x in parts, if they are known; those of the result come third, for a product in the dtype
    ``parts_for`` (``products.launchers``)."""
    kernels, settings = given.load()
    skip = x if given.skip_is_x else skip
    rows = None if skip is None else skip.flatten(0, 1)
    z, kept, parts = kernels.forward(x, *settings, rows, out_dtype, parts, parts_for)
    # Autograd must not take it for a view, or callers could not change it in place.
    z = unsafe_view(z, [*x.shape[:-1], z.shape[1]])
    return z, [tensor for tensor in kept[3 if given.recompute else 0 :] if tensor is not None], parts


def backward(grad: Tensor, x: Tensor, kept: list[Tensor], needs: list[bool], given: MSSAArguments) -> list[Tensor]:
    kernels, (*sources, out, form) = given.load()
    grad = grad.flatten(0, 1)
    whole = [*kept, *[None] * (4 - len(kept))]
    attended = kernels.attend(x, *sources, form, *kept) if given.recompute else kernels.Kept(*whole)
    skip_grad = grad if given.skip_is_x else None
    grad_x, *grads = kernels.backward(grad, x, *sources, out, form, given.qkv_weight, attended, tuple(needs), skip_grad)
    return or_empty((None if grad_x is None else grad_x.view(x.shape), *grads), (x, *given[:5]))


def forward_fake(
    x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, given: MSSAArguments
) -> tuple[Tensor, list[Tensor]]:
    batch, tokens, _ = x.shape
    kept = [x.new_empty(batch * tokens, given.qkv_weight.shape[0], dtype=given.qkv_matrix.dtype) for _ in range(2)]
    kept.append(x.new_empty(batch, given.num_heads, tokens, dtype=torch.float32))
    if given.norm_weight is not None:
        kept.append(x.new_empty(2, batch * tokens, dtype=torch.float32))
    z = x.new_empty(batch, tokens, given.out_weight.shape[0], dtype=out_dtype)
    return z, kept[3:] if given.recompute else kept


def backward_fake(grad: Tensor, x: Tensor, kept: Any, needs: list[bool], given: MSSAArguments) -> list[Tensor]:
    need_x, need_qkv, need_out = needs
    return empty_gradients((x, *given[:5]), (need_x, need_qkv, need_out, need_out, need_qkv, need_qkv))


class _Shapes(Protocol):
    """What FLOP formulas read of ``MSSAArguments``, whose tensors come to them as shapes."""

    qkv_weight: tuple[int, int]
    out_weight: tuple[int, int]
    num_heads: int
    recompute: bool
    is_causal: bool
    window: int | None


def _products(x_shape: tuple[int, ...], given: _Shapes) -> tuple[int, int, int]:
    """FLOPs of the first projection, of one tokens x tokens product of attention, and of the second projection."""
    (batch, tokens, width), inner, out_width = x_shape, given.qkv_weight[0], given.out_weight[0]
    scores = product((batch, given.num_heads, tokens, inner // given.num_heads), given.is_causal, given.window)
    return 2 * batch * tokens * width * inner, scores, 2 * batch * tokens * inner * out_width


def forward_flops(x_shape: tuple[int, ...], skip: Any, out_dtype: Any, given: _Shapes) -> int:
    qkv, scores, out = _products(x_shape, given)
    return qkv + 2 * scores + out


def backward_flops(grad: Any, x_shape: tuple[int, ...], kept: Any, needs: list[bool], given: _Shapes) -> int:
    qkv, scores, out = _products(x_shape, given)
    need_x, need_qkv, need_out = needs
    again = (qkv + 2 * scores) * given.recompute
    return qkv * (need_x + need_qkv) + (5 * scores + out) * (need_x or need_qkv) + out * need_out + again


register("mssa_forward", forward, fake=forward_fake, flops=forward_flops, replayed=True)
register("mssa_backward", backward, fake=backward_fake, flops=backward_flops, replayed=True)
