"""The public function, and the autograd boundary around the operators of the Triton path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crate_kernels import dispatch, validation
from crate_kernels._ops import ops
from crate_kernels.autograd import asked, derivative, save, saved
from crate_kernels.definitions import number_as_tensor
from crate_kernels.dtypes import compute_dtype, no_autocast
from crate_kernels.layer_norm import layer_norm
from crate_kernels.overcomplete import composed, op, reference


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
        lambd: the sparsity weight, at least zero; a number or a tensor, like step_size.
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the step; none where norm_weight is None.
        skip: [..., width] like x, in any dtype, added to the result.

    Returns:
        [..., width]: without skip in x's dtype (the autocast dtype under autocast); with one, in the wider of the two.

    The Triton path takes four launches, and one more for a LayerNorm, which is not folded since n is needed twice. Its backward
    keeps n, z1 and z2. It is deterministic, and second derivatives are refused there.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit, or step_size or lambd is out of range.
        RuntimeError: a forced implementation cannot run on x.

    Source: CRATE-alpha (arXiv 2405.20299), section 3.
    """
    validation.tensors(
        norm=(norm_weight, norm_bias, norm_eps),
        any_dtype="skip",
        x=(x, "... width"),
        dictionary=(dictionary, "width codes"),
        out_dictionary=(out_dictionary, "width codes"),
        skip=(skip, "... width"),
    )
    validation.number_or_tensor("step_size", step_size, positive=True)
    validation.number_or_tensor("lambd", lambd)
    dtype = compute_dtype(x)
    implementation = dispatch.choose("overcomplete_ista", x, dtype, None, (dictionary, out_dictionary))
    x = layer_norm(x, norm_weight, norm_bias, norm_eps)
    arguments = dictionary, out_dictionary, number_as_tensor(step_size), number_as_tensor(lambd)
    if implementation == "triton":
        # The kernels take no float64 skip: it is added after them.
        fused_skip = skip if skip is not None and skip.dtype in dispatch.TRITON_DTYPES else None
        out_dtype = dtype if fused_skip is None else torch.promote_types(dtype, fused_skip.dtype)
        tokens, skip_rows = (None if t is None else t.reshape(-1, x.shape[-1]) for t in (x, fused_skip))
        out = _OvercompleteISTA.apply(tokens, skip_rows, out_dtype, *arguments, dtype).view(x.shape)
        return out if skip is fused_skip else skip + out
    if implementation == "reference":
        out = reference.overcomplete_ista(x, *arguments)
    else:
        with no_autocast(x):
            out = composed.overcomplete_ista(x, *arguments, dtype)
    return out if skip is None else skip + out


class _OvercompleteISTA(torch.autograd.Function):
    """Arguments: x and skip [tokens, width], the result's dtype, and ``op.OvercompleteArguments``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, *arguments: Any) -> Tensor:
        out, *codes = ops.overcomplete_forward(x, skip, out_dtype, *arguments)
        save(ctx, op.OvercompleteArguments(*arguments), x, *codes)
        ctx.skip_dtype = None if skip is None else skip.dtype
        return out

    @staticmethod
    @derivative("overcomplete_ista")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, (x, z1, z2) = saved(ctx)
        want_x, want_skip, _, *want_fields = ctx.needs_input_grad
        want = op.OvercompleteArguments(*want_fields)
        needs = [want_x, want.dictionary, want.out_dictionary, want.step_size or want.lambd]
        operator = ops.overcomplete_backward
        grad_x, *grads = operator(grad, x, z1, z2, needs, *given) if any(needs) else [None]
        return asked((grad_x, grad.to(ctx.skip_dtype) if want_skip else None, None, *grads), ctx.needs_input_grad)
