"""PyTorch operators of MSSA on the Triton path: schemas, shapes, FLOP counts. Imports torch only.

``kept`` is what the backward needs besides x: w and attention's output [batch * tokens, inner] in ``dtype``, the log-sum-exp
[batch, heads, tokens] and, with a LayerNorm, mean and rstd [2, batch * tokens], float32. The composed path has no operator of
its own: its projections are the library's, its attention is ours.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels import dispatch
from crate_kernels.precision import undisturbed
from crate_kernels.schemas import empty_gradient, or_empty


class Arguments(NamedTuple):
    """What both operators take, in the order of their schemas."""

    qkv_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float
    residual_is_x: bool  # x itself is the residual; its gradient then comes back in that of x
    subtract: bool
    num_heads: int
    scale: float
    is_causal: bool
    dtype: torch.dtype

    def load(self) -> tuple[ModuleType, Any, Any]:
        """The kernels' module, and its ``Weights`` and ``Form``."""
        kernels = dispatch.load("mssa", "triton")
        norm = None if self.norm_weight is None else kernels.Norm(self.norm_weight, self.norm_bias, self.norm_eps)
        weights = kernels.Weights(self.qkv_weight, self.out_weight, self.out_bias, norm)
        return kernels, weights, kernels.Form(self.num_heads, self.scale, self.is_causal, self.subtract)


_ARGUMENTS = (
    "Tensor qkv_weight, Tensor out_weight, Tensor? out_bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "bool residual_is_x, bool subtract, int num_heads, float scale, bool is_causal, ScalarType dtype"
)
torch.library.define(
    "crate_kernels::mssa_forward",
    f"(Tensor x, Tensor? residual, ScalarType out_dtype, {_ARGUMENTS}) -> (Tensor out, Tensor[] kept)",
)
torch.library.define(
    "crate_kernels::mssa_backward",
    f"(Tensor grad, Tensor x, Tensor[] kept, bool[] needs, {_ARGUMENTS}) -> (Tensor grad_x, Tensor grad_qkv, "
    "Tensor grad_out, Tensor grad_bias, Tensor grad_norm_weight, Tensor grad_norm_bias)",
)


@torch.library.impl("crate_kernels::mssa_forward", "CompositeExplicitAutograd")
@undisturbed
def _forward(
    x: Tensor, residual: Tensor | None, out_dtype: torch.dtype, *arguments: Any
) -> tuple[Tensor, list[Tensor]]:
    given = Arguments(*arguments)
    kernels, weights, form = given.load()
    skip = x if given.residual_is_x else residual
    skip = None if skip is None else skip.flatten(0, 1)
    z, kept = kernels.forward(x, weights, weights.operands(given.dtype), form, skip, out_dtype)
    # Not a view, which autograd would not let a caller change in place.
    z = torch.ops.aten._unsafe_view(z, [*x.shape[:-1], z.shape[1]])
    return z, [tensor for tensor in kept if tensor is not None]


@torch.library.impl("crate_kernels::mssa_backward", "CompositeExplicitAutograd")
@undisturbed
def _backward(grad: Tensor, x: Tensor, kept: list[Tensor], needs: list[bool], *arguments: Any) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    kernels, weights, form = given.load()
    grad = grad.flatten(0, 1)
    kept = kernels.Kept(*kept, *[None] * (4 - len(kept)))
    past = grad if given.residual_is_x else None
    found = kernels.backward(grad, x, weights, weights.operands(given.dtype), form, kept, tuple(needs), past)
    return tuple(
        or_empty(value, like)
        for value, like in (
            (None if found.x is None else found.x.view(x.shape), x),
            (found.qkv and found.qkv.matrix.t(), given.qkv_weight),
            (found.out and found.out.matrix.t(), given.out_weight),
            (found.out and found.out.bias, given.out_bias),
            (found.qkv and found.qkv.norm_weight, given.norm_weight),
            (found.qkv and found.qkv.norm_bias, given.norm_bias),
        )
    )


@torch.library.register_fake("crate_kernels::mssa_forward")
def _forward_fake(
    x: Tensor, residual: Tensor | None, out_dtype: torch.dtype, *arguments: Any
) -> tuple[Tensor, list[Tensor]]:
    given = Arguments(*arguments)
    batch, tokens, _ = x.shape
    kept = [x.new_empty(batch * tokens, given.qkv_weight.shape[0], dtype=given.dtype) for _ in range(2)]
    kept.append(x.new_empty(batch, given.num_heads, tokens, dtype=torch.float32))
    if given.norm_weight is not None:
        kept.append(x.new_empty(2, batch * tokens, dtype=torch.float32))
    return x.new_empty(batch, tokens, given.out_weight.shape[0], dtype=out_dtype), kept


@torch.library.register_fake("crate_kernels::mssa_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, kept: list[Tensor], needs: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    need_x, need_qkv, need_out = needs
    return (
        empty_gradient(x, need_x),
        empty_gradient(given.qkv_weight, need_qkv),
        empty_gradient(given.out_weight, need_out),
        empty_gradient(given.out_bias, need_out),
        empty_gradient(given.norm_weight, need_qkv),
        empty_gradient(given.norm_bias, need_qkv),
    )


def _flops(x_shape: tuple[int, ...], given: Arguments) -> tuple[int, int, int]:
    """Of the first projection, of one tokens x tokens product of attention, and of the second projection.

    Tensors among the arguments are given by their shapes.
    """
    (batch, tokens, width), inner, out_width = x_shape, given.qkv_weight[0], given.out_weight[0]
    scores = 2 * batch * tokens * tokens * inner // (2 if given.is_causal else 1)
    return 2 * batch * tokens * width * inner, scores, 2 * batch * tokens * inner * out_width


@register_flop_formula(torch.ops.crate_kernels.mssa_forward)
def _forward_flops(x_shape: Any, residual: Any, out_dtype: Any, *arguments: Any, **_: Any) -> int:
    qkv, scores, out = _flops(x_shape, Arguments(*arguments))
    return qkv + 2 * scores + out


@register_flop_formula(torch.ops.crate_kernels.mssa_backward)
def _backward_flops(grad: Any, x_shape: Any, kept: Any, needs: list[bool], *arguments: Any, **_: Any) -> int:
    qkv, scores, out = _flops(x_shape, Arguments(*arguments))
    need_x, need_qkv, need_out = needs
    return qkv * (need_x + need_qkv) + (5 * scores + out) * (need_x or need_qkv) + out * need_out
