"""The public function, and the autograd boundary around the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_kernels import checks, dispatch
from crate_kernels.ista import op, reference
from crate_kernels.ista.form import combination, one_product
from crate_kernels.precision import compute_dtype, is_autocast, layer_norm, layer_norm_dtype, no_autocast
from crate_kernels.schemas import number_as_tensor


def ista(
    x: Tensor,
    weight: Tensor,
    *,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    threshold: str = "relu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    combined: Tensor | None = None,
) -> Tensor:
    """One ISTA step towards a sparse code of x in the dictionary W, with an optional LayerNorm before it.

    ``u = x + step_size * (x W - x W^T W)``, then ``relu(u - step_size * lambd)`` for ``threshold="relu"`` (non-negative
    codes, as the models do), or ``sign(u) * max(|u| - step_size * lambd, 0)`` for ``"soft"`` (signed codes).

    Args:
        x: [..., width]; float32, float16 or bfloat16 (float64 off the Triton path), any strides.
        weight: [width, width], the dictionary W (tokens are rows). Under autocast it stays in its own dtype, float32
            as a rule, and only the products' operands are cast; otherwise its dtype is x's.
        step_size: eta, above zero. A number, or a tensor of one element, which may ask for a gradient; the value of a tensor
            on a GPU is not checked, since that would wait for the device.
        lambd: the sparsity weight, at least zero; number or tensor, likewise.
        threshold: "relu" or "soft".
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the step; none where norm_weight is None.
        combined: ``combine(weight)``, made before, for inference: the weight is then a constant, and the step always one
            product. It must be made again when the weight changes.

    Returns:
        [..., width] in the dtype of x, or of its LayerNorm where there is one: float32 under autocast, except that on a CPU
        the reference and the composed path leave tokens that come in the autocast dtype in it, as PyTorch's own LayerNorm does.

    Where tokens outnumber the width the step is one large product forward and two backward, otherwise two and five. The
    output itself is the backward's mask. With a LayerNorm, x is kept for the backward as it came, and normalised again there.
    It is deterministic, and cannot be differentiated again.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit, step_size or lambd is out of range, or threshold is unknown.
        RuntimeError: a forced implementation cannot run on x.

    Source: CRATE (arXiv 2306.01129), section 2.4; CRATE-MAE (arXiv 2404.02446), section 3.
    """
    check(x, weight, step_size, lambd, threshold, norm_weight, norm_bias, norm_eps, combined)
    dtype, soft = compute_dtype(x), threshold == "soft"
    implementation = dispatch.choose(x, dtype)
    tokens, width = x.numel() // x.shape[-1], x.shape[-1]
    # The kernels fold a LayerNorm into the one product; before two, and before the reference, it comes by itself.
    folds = combined is not None or one_product(tokens, width)
    if implementation == "reference" or (implementation == "triton" and not folds):
        x = layer_norm(x, norm_weight, norm_bias, norm_eps, before=dtype)
        norm_weight = norm_bias = None
    if implementation == "reference":
        return reference.ista(x, weight, step_size, lambd, soft)
    numbers = number_as_tensor(step_size), number_as_tensor(lambd)
    out_dtype = x.dtype
    if norm_weight is not None:
        out_dtype = layer_norm_dtype(x, before=dtype if implementation == "composed" else None)
    norm = norm_weight, norm_bias, float(norm_eps)
    arguments = weight, combined, *norm, *numbers, soft, dtype, implementation
    return _ISTA.apply(x, out_dtype, *arguments)


def combine(weight: Tensor) -> Tensor:
    """G = W - W^T W [width, width], what ``ista`` multiplies the tokens with; float32, or float64 of a float64 weight.

    Raises:
        TypeError: weight is not a floating-point tensor.
        ValueError: weight is not square.
    """
    checks.tensor("weight", weight, "width width")
    checks.shape("weight", weight, (weight.shape[1],) * 2, "a square dictionary")
    with no_autocast(weight), torch.no_grad():
        return combination(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def check(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lambd: float | Tensor,
    threshold: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    combined: Tensor | None,
) -> None:
    checks.tensor("x", x, "... width")
    checks.tensor("weight", weight, "width width")
    width = x.shape[-1]
    checks.shape("weight", weight, (width, width), "a square dictionary as wide as x")
    checks.layer_norm(width, norm_weight, norm_bias, norm_eps)
    checks.same_device_and_dtype(is_autocast(x), x=x, weight=weight, norm_weight=norm_weight, norm_bias=norm_bias)
    checks.number_or_tensor("step_size", step_size, positive=True)
    checks.number_or_tensor("lambd", lambd)
    if combined is not None:
        checks.tensor("combined", combined, "width width")
        checks.shape("combined", combined, (width, width), "what combine(weight) gives")
        checks.same_device_and_dtype(True, x=x, combined=combined)
    if threshold not in ("relu", "soft"):
        raise ValueError(f'threshold: expected "relu" or "soft", got {threshold!r}')


class _ISTA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out_dtype: torch.dtype, *arguments: Any) -> Tensor:
        y, kept = torch.ops.crate_kernels.ista_forward(x, out_dtype, *arguments)
        given = op.Arguments(*arguments)
        if given.implementation == "composed" and given.norm is None and x.dtype != given.dtype:
            *kept, x = kept
        ctx.save_for_backward(x, y, *arguments[:4], given.step_size, given.lambd, *kept)
        ctx.settings = given.norm_eps, given.soft, given.dtype, given.implementation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, combined, norm_weight, norm_bias, step_size, lambd, *kept = ctx.saved_tensors
        norm_eps, *settings = ctx.settings
        given = op.Arguments(weight, combined, norm_weight, norm_bias, norm_eps, step_size, lambd, *settings)
        want_x, _, *want = ctx.needs_input_grad
        found = [None] * 4
        needs = want_x, (want[0] and combined is None) or want[2] or want[3]
        if any(needs):
            found = torch.ops.crate_kernels.ista_backward(grad_y, x, y, kept, *needs, *given)
        wanted = want_x, want[0] and combined is None, want[2], want[3]
        grad_x, grad_weight, *grads_of_norm = [g if w else None for g, w in zip(found, wanted, strict=True)]
        grads_of_numbers = _gradients_of_numbers(grad_y, x, y, given, *want[5:7])
        return grad_x, None, grad_weight, None, *grads_of_norm, None, *grads_of_numbers, None, None, None


def _gradients_of_numbers(
    grad_y: Tensor, x: Tensor, y: Tensor, given: op.Arguments, need_step_size: bool, need_lambd: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of eta and lambda. With s = sign(y), which is zero where the threshold let nothing pass,

    deta = sum (g s^2) * (x W - x W^T W) - lambda * sum g s      dlambda = -eta * sum g s
    """
    if not (need_step_size or need_lambd):
        return None, None
    dtype = torch.promote_types(y.dtype, torch.float32)
    tensors = x, y, grad_y, given.weight, given.norm_weight, given.norm_bias
    x, y, grad, weight, norm_weight, norm_bias = (None if t is None else t.to(dtype) for t in tensors)
    sign = y.sign()
    through_threshold = -(grad * sign).sum()
    grad_step_size = grad_lambd = None
    if need_step_size:
        with no_autocast(x):
            x = layer_norm(x, norm_weight, norm_bias, given.norm_eps)
            product = (x - x @ weight.t()) @ weight
        through_product = (grad * sign.abs() * product).sum()
        grad_step_size = (through_product + through_threshold * given.lambd).to(given.step_size)
    if need_lambd:
        grad_lambd = (through_threshold * given.step_size).to(given.lambd)
    return grad_step_size, grad_lambd
