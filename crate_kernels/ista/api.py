"""The public function, and the autograd boundary around the operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crate_kernels import dispatch, validation
from crate_kernels._ops import ops
from crate_kernels.autograd import Formula, asked, derivative, save, saved
from crate_kernels.definitions import number_as_tensor
from crate_kernels.dtypes import compute_dtype, no_autocast
from crate_kernels.ista import op, reference
from crate_kernels.ista.form import combined_of, one_product
from crate_kernels.layer_norm import layer_norm, layer_norm_dtype
from crate_kernels.products.norm_folding import Operand, as_norm
from crate_kernels.products.op import combined_operands, operands
from crate_kernels.products.prepared import Prepared, as_prepared, checked_or_made


def ista(
    x: Tensor,
    dictionary: Tensor,
    *,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    threshold: str = "relu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    combined: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    prepared: Prepared | None = None,
) -> Tensor:
    """One ISTA step towards a sparse code of x in the dictionary W, with an optional LayerNorm before it.

    ``u = x + step_size * (x W - x W^T W)``, then ``relu(u - step_size * lambd)`` for ``threshold="relu"`` (non-negative
    codes, as the models do), or ``sign(u) * max(|u| - step_size * lambd, 0)`` for ``"soft"`` (signed codes).

    Args:
        x: [..., width]; float32, float16 or bfloat16 (float64 off the Triton path), any strides.
        dictionary: W, [width, width] (tokens are rows). Under autocast it stays in its own dtype, float32
            as a rule, and only the products' operands are cast; otherwise its dtype is x's.
        step_size: eta, above zero. A number, or a tensor of one element, which may ask for a gradient; the value of a tensor
            on a GPU is not checked, since that would wait for the device.
        lambd: the sparsity weight, at least zero; a number or a tensor, like step_size.
        threshold: "relu" or "soft".
        norm_weight, norm_bias, norm_eps: LayerNorm over the width before the step; none where norm_weight is None.
        combined: ``combine(dictionary)``, made before, for inference. The step is then one product for any number of tokens, and
            the dictionary gets no gradient. It must be made again when the dictionary changes.
        out_dtype: the dtype of the result, if another is wanted than below.
        prepared: this operator's part of what ``prepare_layers`` returned, checked against dictionary, LayerNorm and step_size;
            made here if None. The step is then one product for any number of tokens. Ignored off the Triton path, and with
            ``combined``.

    Returns:
        [..., width] in the dtype of x, or with a LayerNorm in the dtype of LN(x). Under autocast that is float32; only on a CPU,
        off the Triton path, tokens in the autocast dtype keep it, as with PyTorch's own LayerNorm.

    If there are more tokens than features the step is one large product forward and two backward, otherwise two and five. The
    backward reads from the output what passed the threshold. With a LayerNorm it keeps x as it came, and normalises it again.
    It is deterministic. Kernels refuse second and higher derivatives; the composed path has them, by autograd of the formula,
    except without a LayerNorm under autocast, where x is not kept.

    Raises:
        TypeError: an argument is not a floating-point tensor or a number, or dtypes are mixed without autocast.
        ValueError: shapes do not fit, step_size or lambd is out of range, or threshold is unknown.
        RuntimeError: a forced implementation cannot run on x.

    Source: CRATE (arXiv 2306.01129), section 2.4; CRATE-MAE (arXiv 2404.02446), section 3.
    """
    x, dtype, given = choose(
        x, dictionary, step_size=step_size, lambd=lambd, threshold=threshold, norm_weight=norm_weight, norm_bias=norm_bias,
        norm_eps=norm_eps, combined=combined, out_dtype=out_dtype, prepared=prepared,
    )  # fmt: skip
    if given is None:
        dictionary = dictionary if combined is None else dictionary.detach()  # a constant
        y = reference.ista(x, dictionary, step_size, lambd, threshold == "soft")
        return y if out_dtype is None else y.to(out_dtype)
    return _ISTA.apply(x, dtype, *given)


def choose(
    x: Tensor,
    dictionary: Tensor,
    *,
    step_size: float | Tensor = 0.1,
    lambd: float | Tensor = 0.1,
    threshold: str = "relu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    combined: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    prepared: Prepared | None = None,
) -> tuple[Tensor, torch.dtype, op.ISTAArguments | None]:
    """Checks the arguments of ``ista``, and chooses how it computes.

    Returns:
        x, after the LayerNorm where the operator applies none; the dtype of the result; and the operator's other arguments, or
        None for the reference.
    """
    validation.tensors(
        norm=(norm_weight, norm_bias, norm_eps),
        any_dtype="combined",
        x=(x, "... width"),
        dictionary=(dictionary, "width width"),
        combined=(combined, "width width"),
    )
    validation.number_or_tensor("step_size", step_size, positive=True)
    validation.number_or_tensor("lambd", lambd)
    if threshold not in ("relu", "soft"):
        raise ValueError(f'threshold: expected "relu" or "soft", got {threshold!r}')
    dtype, soft = compute_dtype(x), threshold == "soft"
    implementation = dispatch.choose("ista", x, dtype, None, (dictionary, norm_weight, norm_bias))
    tokens, width = x.numel() // x.shape[-1], x.shape[-1]
    # Kernels fold a LayerNorm into a single product. Before two products, and for the reference, it is applied here.
    prepares = implementation == "triton" and prepared is not None
    one = combined is not None or prepares or one_product(tokens, width)
    if implementation == "reference" or (implementation == "triton" and not one):
        x = layer_norm(x, norm_weight, norm_bias, norm_eps, before=dtype)
        norm_weight = norm_bias = None
    if combined is not None:
        dictionary = dictionary.detach()  # a constant
    if implementation == "reference":
        return x, x.dtype, None
    if out_dtype is None:
        out_dtype = x.dtype
        if norm_weight is not None:
            out_dtype = layer_norm_dtype(x, before=dtype if implementation == "composed" else None)
    numbers = number_as_tensor(step_size), number_as_tensor(lambd)
    operand: Operand | tuple[None, None, None] = (None, None, None)
    if combined is not None and implementation == "triton":
        norm = as_norm(norm_weight, norm_bias)
        (operand,) = operands([combined], [None], [norm], dtype, numbers[0])
    elif implementation == "triton" and one:
        made_of = ISTASources(dictionary, norm_weight, norm_bias, step_size)
        prepared = checked_or_made(prepared, made_of, dtype, prepare_ista)
        (operand,), combined = prepared.operands, prepared.combined
    settings = float(norm_eps), *numbers, soft, dtype, implementation
    given = dictionary, combined, norm_weight, norm_bias, *operand, *settings
    return x, out_dtype, op.ISTAArguments._make(given)


class ISTASources(NamedTuple):
    """What ``prepare_ista`` takes of one step."""

    dictionary: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    step_size: float | Tensor


def prepare_ista(layers: Sequence[ISTASources], dtype: torch.dtype) -> list[Prepared]:
    """G and the matrix that each step multiplies with in ``dtype``; all steps have one shape and one step size."""
    norms = [as_norm(layer.norm_weight, layer.norm_bias) for layer in layers]
    step_size = number_as_tensor(layers[0].step_size)
    made = combined_operands([layer.dictionary for layer in layers], norms, step_size, dtype)
    return [as_prepared((one,), layer, combined) for (combined, one), layer in zip(made, layers, strict=True)]


def combine(dictionary: Tensor) -> Tensor:
    """G = W - W^T W [width, width], which ``ista`` multiplies the tokens with; float32, or float64 for a float64 dictionary.

    Raises:
        TypeError: dictionary is not a floating-point tensor.
        ValueError: dictionary is not square.
    """
    validation.tensor("dictionary", dictionary, "width width")
    with no_autocast(dictionary), torch.no_grad():
        return combined_of(dictionary.to(torch.promote_types(dictionary.dtype, torch.float32)))


def _formula_of(ctx: Any) -> Formula | None:
    if ctx.given.implementation == "triton":
        return None
    if ctx.keeps_cast:
        raise RuntimeError(
            "ista: under autocast and without a LayerNorm only a cast of x is kept, which gives no second derivative and no "
            'batched gradients; run the forward under crate_kernels.use("reference"), or outside autocast'
        )
    return _formula


def _formula(x: Tensor, given: op.ISTAArguments) -> Tensor:
    tensors = x, given.dictionary, given.norm_weight, given.norm_bias
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None], torch.float32)
    normalised = _normalised(x, given, dtype)
    return reference.ista(normalised, given.dictionary.to(dtype), given.step_size, given.lambd, given.soft)


def _normalised(x: Tensor, given: op.ISTAArguments, dtype: torch.dtype) -> Tensor:
    """LN(x), or x where there is no LayerNorm, in ``dtype`` and in PyTorch's own calls."""
    weight, bias = (None if one is None else one.to(dtype) for one in (given.norm_weight, given.norm_bias))
    return layer_norm(x.to(dtype), weight, bias, given.norm_eps)


class _ISTA(torch.autograd.Function):
    """Arguments: x, the result's dtype, and ``op.ISTAArguments``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_dtype: torch.dtype, *arguments: Any) -> Tensor:
        y, kept = ops.ista_forward(x, out_dtype, *arguments)
        given = op.ISTAArguments(*arguments)
        ctx.keeps_cast = given.implementation == "composed" and given.norm is None and x.dtype != given.dtype
        if ctx.keeps_cast:
            *kept, x = kept
        save(ctx, given, x, y, *kept)
        return y

    @staticmethod
    @derivative("ista", _formula_of)
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        given, (x, y, *kept) = saved(ctx)
        need_x, _, *want_fields = ctx.needs_input_grad
        want = op.ISTAArguments(*want_fields)
        needs = need_x, want.dictionary or want.norm_weight or want.norm_bias
        found: list[Tensor | None] = [None] * 4
        numbers: tuple[Tensor, ...] = ()
        if any(needs):
            found = ops.ista_backward(grad_y, x, y, kept, *needs, *given)
        if want.step_size or want.lambd:
            numbers = _gradients_of_numbers(grad_y, x, y, given)
        grad_x, grad_dictionary, *grads_of_norm = found
        grads = grad_x, None, grad_dictionary, None, *grads_of_norm, *[None] * 4, *numbers
        return asked(grads, ctx.needs_input_grad)


def _gradients_of_numbers(grad_y: Tensor, x: Tensor, y: Tensor, given: op.ISTAArguments) -> tuple[Tensor, Tensor]:
    """deta and dlambda. With s = sign(y), which is zero where the threshold let nothing pass,

    deta = sum (g s^2) * (x W - x W^T W) - lambda * sum g s      dlambda = -eta * sum g s
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    y, grad, dictionary = (tensor.to(dtype) for tensor in (y, grad_y, given.dictionary))
    with no_autocast(x):
        x = _normalised(x, given, dtype)
        product = (x - x @ dictionary.t()) @ dictionary
    through_threshold = -(grad * y.sign()).sum()
    grad_step_size = (grad * y.sign().abs() * product).sum() + through_threshold * given.lambd
    return grad_step_size.to(given.step_size), (through_threshold * given.step_size).to(given.lambd)
