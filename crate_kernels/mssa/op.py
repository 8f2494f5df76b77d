"""PyTorch operators of MSSA on the Triton path: schemas, shapes, FLOP counts. Imports torch only.

``kept`` is what the backward needs besides x: w and attention's output [batch * tokens, inner] in the dtype of the products, the
log-sum-exp [batch, heads, tokens] and, with a LayerNorm, mean and rstd [2, batch * tokens], float32; nothing with ``recompute``.
The composed path has no operator of its own: its projections are the library's, its attention is ours.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels import dispatch
from crate_kernels.precision import undisturbed
from crate_kernels.products.operand import Norm, Operand
from crate_kernels.schemas import empty_gradient, or_empty


class MSSAArguments(NamedTuple):
    """What both operators take, in the order of their schemas: weights, their operands, settings."""

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
    skip_is_x: bool  # its gradient then comes back in that of x
    subtract: bool
    num_heads: int
    scale: float
    is_causal: bool
    recompute: bool

    @property
    def norm(self) -> Norm | None:
        return None if self.norm_weight is None else Norm(self.norm_weight, self.norm_bias, self.norm_eps)

    def load(self) -> tuple[ModuleType, tuple[Any, ...]]:
        """The kernels' module, and what its functions take after x: norm, both operands and ``Form``."""
        kernels = dispatch.load("mssa", "triton")
        form = kernels.Form(self.num_heads, self.scale, self.is_causal, self.subtract)
        qkv = Operand(self.qkv_matrix, self.qkv_column_sum, self.qkv_offset)
        return kernels, (self.norm, qkv, Operand(self.out_matrix, None, self.out_offset), form)


_ARGUMENTS = (
    "Tensor qkv_weight, Tensor out_weight, Tensor? out_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor qkv_matrix, "
    "Tensor? qkv_column_sum, Tensor? qkv_offset, Tensor out_matrix, Tensor? out_offset, float norm_eps, bool skip_is_x, "
    "bool subtract, int num_heads, float scale, bool is_causal, bool recompute"
)
torch.library.define(
    "crate_kernels::mssa_forward",
    f"(Tensor x, Tensor? skip, ScalarType out_dtype, {_ARGUMENTS}) -> (Tensor out, Tensor[] kept)",
)
torch.library.define(
    "crate_kernels::mssa_backward",
    f"(Tensor grad, Tensor x, Tensor[] kept, bool[] needs, {_ARGUMENTS}) -> (Tensor grad_x, Tensor grad_qkv, "
    "Tensor grad_out, Tensor grad_bias, Tensor grad_norm_weight, Tensor grad_norm_bias)",
)


@torch.library.impl("crate_kernels::mssa_forward", "CompositeExplicitAutograd")
@undisturbed
def _forward(x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    given = MSSAArguments(*arguments)
    kernels, settings = given.load()
    skip = x if given.skip_is_x else skip
    z, kept = kernels.forward(x, *settings, None if skip is None else skip.flatten(0, 1), out_dtype)
    # Not a view, which autograd would not let a caller change in place.
    z = torch.ops.aten._unsafe_view(z, [*x.shape[:-1], z.shape[1]])
    return z, [] if given.recompute else [tensor for tensor in kept if tensor is not None]


@torch.library.impl("crate_kernels::mssa_backward", "CompositeExplicitAutograd")
@undisturbed
def _backward(grad: Tensor, x: Tensor, kept: list[Tensor], needs: list[bool], *arguments: Any) -> tuple[Tensor, ...]:
    given = MSSAArguments(*arguments)
    kernels, settings = given.load()
    grad = grad.flatten(0, 1)
    attended = (
        kernels.attend(x, *settings[:2], settings[3])
        if given.recompute
        else kernels.Kept(*kept, *[None] * (4 - len(kept)))
    )
    past = grad if given.skip_is_x else None
    grad_x, *found = kernels.backward(grad, x, *settings, given.qkv_weight, attended, tuple(needs), past)
    grad_x = None if grad_x is None else grad_x.view(x.shape)
    return tuple(map(or_empty, (grad_x, *found), (x, *given[:5])))


@torch.library.register_fake("crate_kernels::mssa_forward")
def _forward_fake(
    x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, *arguments: Any
) -> tuple[Tensor, list[Tensor]]:
    given = MSSAArguments(*arguments)
    batch, tokens, _ = x.shape
    kept = [x.new_empty(batch * tokens, given.qkv_weight.shape[0], dtype=given.qkv_matrix.dtype) for _ in range(2)]
    kept.append(x.new_empty(batch, given.num_heads, tokens, dtype=torch.float32))
    if given.norm_weight is not None:
        kept.append(x.new_empty(2, batch * tokens, dtype=torch.float32))
    z = x.new_empty(batch, tokens, given.out_weight.shape[0], dtype=out_dtype)
    return z, [] if given.recompute else kept


@torch.library.register_fake("crate_kernels::mssa_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, kept: list[Tensor], needs: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    need_x, need_qkv, need_out = needs
    asked = need_x, need_qkv, need_out, need_out, need_qkv, need_qkv
    return tuple(map(empty_gradient, (x, *arguments[:5]), asked))


def _flops(x_shape: tuple[int, ...], given: MSSAArguments) -> tuple[int, int, int]:
    """Of the first projection, of one tokens x tokens product of attention, and of the second projection.

    Tensors among the arguments are given by their shapes.
    """
    (batch, tokens, width), inner, out_width = x_shape, given.qkv_weight[0], given.out_weight[0]
    scores = 2 * batch * tokens * tokens * inner // (2 if given.is_causal else 1)
    return 2 * batch * tokens * width * inner, scores, 2 * batch * tokens * inner * out_width


@register_flop_formula(torch.ops.crate_kernels.mssa_forward)
def _forward_flops(x_shape: Any, skip: Any, out_dtype: Any, *arguments: Any, **_: Any) -> int:
    qkv, scores, out = _flops(x_shape, MSSAArguments(*arguments))
    return qkv + 2 * scores + out


@register_flop_formula(torch.ops.crate_kernels.mssa_backward)
def _backward_flops(grad: Any, x_shape: Any, kept: Any, needs: list[bool], *arguments: Any, **_: Any) -> int:
    given = MSSAArguments(*arguments)
    qkv, scores, out = _flops(x_shape, given)
    need_x, need_qkv, need_out = needs
    again = (qkv + 2 * scores) * given.recompute
    return qkv * (need_x + need_qkv) + (5 * scores + out) * (need_x or need_qkv) + out * need_out + again
