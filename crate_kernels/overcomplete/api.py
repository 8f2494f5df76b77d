"""The public function, and the autograd boundary around the operators of the Triton path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_kernels import checks, dispatch
from crate_kernels.overcomplete import composed, op, reference  # noqa: F401  (op registers the operators)
from crate_kernels.precision import compute_dtype, is_autocast, layer_norm, no_autocast
from crate_kernels.schemas import number_as_tensor


def overcomplete_ista(
    x: Tensor,
    dictionary: Tensor,
    out_dictionary: Tensor | None,
    *,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    skip: Tensor | None = None,
) -> Tensor:
    """CRATE-alpha's sparse step: two ISTA steps from zero in an overcomplete dictionary D, and back by another, D1.

    With n = LN(x), or x where there is no LayerNorm,

        z1 = relu(step_size * n D - step_size * lambd)
        z2 = relu(z1 - step_size * (z1 D^T - n) D - step_size * lambd)
        out = skip + z2 D1^T

    Args:
        x: [..., width]; float32, float16 or bfloat16 (float64 off the Triton path), any strides.
        dictionary: D, [width, codes]; the published models have four times as many codes as features. Under autocast it may
            stay in its own dtype; otherwise its dtype is x's.
        out_dictionary: D1, [width, codes], or None for the coupled form, in which D1 is D.
        step_size: eta, above zero. A number, or a tensor of one element, which may ask for a gradient; the value of a tensor
            on a GPU is not checked, since that would wait for the device.
        lambd: the sparsity weight, at least zero; number or tensor, likewise.
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the step; none where norm_weight is None.
        skip: [..., width] like x, in any dtype, added to the result.

    Returns:
        [..., width]: without skip in x's dtype (the autocast dtype under autocast); with one, in the wider of the two.

    The Triton path is four launches; a LayerNorm is one more before them, since both of the first two products need n. Kept for
    the backward are n, z1 and z2. It is deterministic, and cannot be differentiated again there.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit, or step_size or lambd is out of range.
        RuntimeError: a forced implementation cannot run on x.

    Source: CRATE-alpha (arXiv 2405.20299), section 3.
    """
    _check(x, dictionary, out_dictionary, step_size, lambd, norm_weight, norm_bias, norm_eps, skip)
    dtype = compute_dtype(x)
    implementation = dispatch.choose(x, dtype)
    x = layer_norm(x, norm_weight, norm_bias, norm_eps)
    arguments = dictionary, out_dictionary, number_as_tensor(step_size), number_as_tensor(lambd)
    if implementation == "triton":
        # A float64 skip, which the kernels do not take, is added behind them.
        past = skip if skip is not None and skip.dtype in dispatch.TRITON_DTYPES else None
        out_dtype = dtype if past is None else torch.promote_types(dtype, past.dtype)
        tokens, rows = (None if t is None else t.reshape(-1, x.shape[-1]) for t in (x, past))
        out = _OvercompleteISTA.apply(tokens, rows, out_dtype, *arguments, dtype).view(x.shape)
        return out if skip is past else skip + out
    if implementation == "reference":
        out = reference.overcomplete_ista(x, *arguments)
    else:
        with no_autocast(x):
            out = composed.overcomplete_ista(x, *arguments, dtype)
    return out if skip is None else skip + out


class _OvercompleteISTA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, *arguments: Any) -> Tensor:
        out, *codes = torch.ops.crate_kernels.overcomplete_forward(x, skip, out_dtype, *arguments)
        ctx.save_for_backward(x, *codes, *arguments[:4])
        ctx.dtype = arguments[4]
        ctx.skip_dtype = None if skip is None else skip.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z1, z2, *weights = ctx.saved_tensors
        want_x, want_skip, _, *want, _ = ctx.needs_input_grad
        wanted, found = (want_x, *want), [None] * 5
        if any(wanted):
            needs = [*wanted[:3], wanted[3] or wanted[4]]
            found = torch.ops.crate_kernels.overcomplete_backward(grad, x, z1, z2, needs, *weights, ctx.dtype)
        grad_x, *grads = [g if want else None for g, want in zip(found, wanted, strict=True)]
        grad_skip = grad.to(ctx.skip_dtype) if want_skip else None
        return grad_x, grad_skip, None, *grads, None


def _check(
    x: Tensor,
    dictionary: Tensor,
    out_dictionary: Tensor | None,
    step_size: float | Tensor,
    lambd: float | Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    skip: Tensor | None,
) -> None:
    checks.tensor("x", x, "... width")
    checks.tensor("dictionary", dictionary, "width codes")
    width, codes = x.shape[-1], dictionary.shape[1]
    checks.shape("dictionary", dictionary, (width, codes), "[width of x, codes]")
    if out_dictionary is not None:
        checks.tensor("out_dictionary", out_dictionary, "width codes")
        checks.shape("out_dictionary", out_dictionary, (width, codes), "[width, codes] like dictionary")
    checks.layer_norm(width, norm_weight, norm_bias, norm_eps)
    parameters = dict(dictionary=dictionary, out_dictionary=out_dictionary)
    checks.same_device_and_dtype(is_autocast(x), x=x, **parameters, norm_weight=norm_weight, norm_bias=norm_bias)
    checks.number_or_tensor("step_size", step_size, positive=True)
    checks.number_or_tensor("lambd", lambd)
    if skip is not None:
        checks.tensor("skip", skip, "... width")
        checks.shape("skip", skip, tuple(x.shape), "the shape of x")
        checks.same_device_and_dtype(True, x=x, skip=skip)
