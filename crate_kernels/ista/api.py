"""The public function, and the autograd boundary around the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_kernels import checks, dispatch
from crate_kernels.ista import op, reference  # noqa: F401  (op registers the operators)
from crate_kernels.precision import compute_dtype, is_autocast, layer_norm


def ista(
    x: Tensor,
    weight: Tensor,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
    threshold: str = "relu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """One ISTA step towards a sparse code of x in the dictionary W, with an optional LayerNorm before it.

    ``u = x + step_size * (x W - x W^T W)``, then ``relu(u - step_size * lambd)`` for ``threshold="relu"`` (non-negative
    codes, as the models do), or ``sign(u) * max(|u| - step_size * lambd, 0)`` for ``"soft"`` (signed codes).

    Args:
        x: [..., width]; float32, float16 or bfloat16 (float64 off the Triton path), any strides.
        weight: [width, width], the dictionary W (tokens are rows). Under autocast it stays in its own dtype, float32
            as a rule, and only the products' operands are cast; otherwise its dtype is x's.
        step_size: eta, above zero.
        lambd: the sparsity weight, at least zero.
        threshold: "relu" or "soft".
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the step; none where norm_weight is None.

    Returns:
        [..., width] in the dtype of x, or of its LayerNorm where there is one (float32 under autocast).

    Where tokens outnumber the width the step is one large product forward and two backward, otherwise two and five. The
    output itself is the backward's mask. It is deterministic, and cannot be differentiated again.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit, step_size or lambd is out of range, or threshold is unknown.
        RuntimeError: a forced implementation cannot run on x.

    Source: CRATE (arXiv 2306.01129), section 2.4; CRATE-MAE (arXiv 2404.02446), section 3.
    """
    _check(x, weight, step_size, lambd, threshold, norm_weight, norm_bias, norm_eps)
    x = layer_norm(x, norm_weight, norm_bias, norm_eps)
    dtype, soft = compute_dtype(x), threshold == "soft"
    implementation = dispatch.choose(x, dtype)
    if implementation == "reference":
        return reference.ista(x, weight, step_size, lambd, soft)
    tokens = x.reshape(-1, x.shape[-1])
    return _ISTA.apply(tokens, weight, float(step_size), float(lambd), soft, dtype, implementation).view(x.shape)


def _check(
    x: Tensor,
    weight: Tensor,
    step_size: float,
    lambd: float,
    threshold: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> None:
    checks.tensor("x", x, "... width")
    checks.tensor("weight", weight, "width width")
    width = x.shape[-1]
    checks.shape("weight", weight, (width, width), "a square dictionary as wide as x")
    checks.layer_norm(width, norm_weight, norm_bias, norm_eps)
    checks.same_device_and_dtype(is_autocast(x), x=x, weight=weight, norm_weight=norm_weight, norm_bias=norm_bias)
    checks.number("step_size", step_size, positive=True)
    checks.number("lambd", lambd)
    if threshold not in ("relu", "soft"):
        raise ValueError(f'threshold: expected "relu" or "soft", got {threshold!r}')


class _ISTA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        step_size: float,
        lambd: float,
        soft: bool,
        dtype: torch.dtype,
        implementation: str,
    ) -> Tensor:
        operand = x.to(dtype)
        y, matrix = torch.ops.crate_kernels.ista_forward(x, operand, weight, step_size, lambd, soft, implementation)
        ctx.save_for_backward(operand, weight, y, matrix)
        ctx.arguments = step_size, implementation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        step_size, implementation = ctx.arguments
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x, grad_weight = torch.ops.crate_kernels.ista_backward(
            grad_y, *ctx.saved_tensors, step_size, need_x, need_weight, implementation
        )
        return (grad_x if need_x else None), (grad_weight if need_weight else None), None, None, None, None, None
