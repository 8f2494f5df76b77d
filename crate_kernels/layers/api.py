"""The public functions, and the autograd boundary around the operators of the Triton path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from crate_kernels import checks, dispatch
from crate_kernels.ista.api import check as check_ista
from crate_kernels.ista.api import ista
from crate_kernels.layers import op
from crate_kernels.mssa.api import check as check_mssa
from crate_kernels.mssa.api import mssa
from crate_kernels.norm_linear.api import check as check_norm_linear
from crate_kernels.norm_linear.api import norm_linear
from crate_kernels.precision import compute_dtype
from crate_kernels.products.operand import Norm
from crate_kernels.schemas import number_as_tensor
from crate_kernels.shared_attention.api import obstacle_to_triton


class AttentionWeights(NamedTuple):
    """MSSA's: qkv [num_heads * head_dim, width], out [width, num_heads * head_dim], out_bias [width] or None."""

    qkv: Tensor
    out: Tensor | None
    out_bias: Tensor | None


class EncoderWeights(NamedTuple):
    """Of one encoder layer, in the order of ``encoder_layer``'s arguments."""

    attention_norm: Norm
    attention: AttentionWeights
    sparse_norm: Norm
    dictionary: Tensor


class DecoderWeights(NamedTuple):
    """Of one decoder layer, in the order of ``decoder_layer``'s arguments."""

    step_norm: Norm
    weight: Tensor
    attention_norm: Norm
    attention: AttentionWeights


def encoder_layer(
    x: Tensor,
    attention_norm: Norm,
    attention: AttentionWeights,
    sparse_norm: Norm,
    dictionary: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    step_size: float = 0.1,
    lambd: float = 0.1,
    threshold: str = "relu",
    recompute: bool = False,
    prepared: list[Tensor] | None = None,
) -> Tensor:
    """One CRATE layer: ``z = x + MSSA(LN x)``, ``y = ISTA(LN z)``.

    Args:
        x: [batch, tokens, width]. Its dtype is the dtype of the stream between layers: float32 or, for half the memory and
            traffic, 16-bit; products take the autocast dtype where autocast is on.
        attention_norm, attention: LayerNorm and weights of MSSA (``crate_kernels.mssa``).
        sparse_norm, dictionary: LayerNorm and weight of the sparse step (``crate_kernels.ista``), with its step_size, lambd
            and threshold.
        num_heads, scale: of attention; scale is head_dim**-0.5 if None.
        recompute: do projection and attention again in the backward rather than keep what they gave.
        prepared: this layer's part of ``prepare_layers``; made here if None. Not looked at off the Triton path.

    Returns:
        [batch, tokens, width] in x's dtype.

    On the Triton path one operator forward and one backward. Of [tokens, width] tensors it keeps four for the backward: x, w,
    attention's output and z (y is the next layer's x); with ``recompute`` two, x and z. w and attention's output are in the
    dtype of the products, x and z in the stream's. Deterministic; cannot be differentiated again.

    Raises:
        TypeError, ValueError, RuntimeError: as ``mssa`` and ``ista`` do.

    Source: CRATE (arXiv 2306.01129), section 2; CRATE-MAE (arXiv 2404.02446), section 3.
    """
    _check_kinds(attention_norm=attention_norm, attention=attention, sparse_norm=sparse_norm)
    dtype, implementation = _choose(x, attention, num_heads)
    if implementation != "triton" or attention.out is None:

        def layer(x: Tensor) -> Tensor:
            z = mssa(x, *attention, num_heads=num_heads, scale=scale, residual=x, **_options(attention_norm))
            sparse = _options(sparse_norm)
            y = ista(z, dictionary, step_size=step_size, lambd=lambd, threshold=threshold, **sparse)
            return y.to(x.dtype)

        return _checkpointed(layer, x, implementation) if recompute else layer(x)
    check_mssa(x, *attention, num_heads, *attention_norm, x, False)
    check_ista(x, dictionary, step_size, lambd, threshold, *sparse_norm, None)
    step = dictionary, sparse_norm, number_as_tensor(step_size), number_as_tensor(lambd), threshold == "soft"
    return _apply(x, attention, attention_norm, *step, num_heads, scale, recompute, dtype, prepared)


def decoder_layer(
    x: Tensor,
    step_norm: Norm,
    weight: Tensor,
    attention_norm: Norm,
    attention: AttentionWeights,
    *,
    num_heads: int,
    scale: float | None = None,
    recompute: bool = False,
    prepared: list[Tensor] | None = None,
) -> Tensor:
    """One CRATE-MAE decoder layer: ``g = LN(x) W^T``, ``y = g - MSSA(LN g)``.

    Args:
        x: [batch, tokens, width].
        step_norm, weight: LayerNorm and W [width, width] of the linear step (``crate_kernels.norm_linear``).
        attention_norm, attention, num_heads, scale: of MSSA (``crate_kernels.mssa``).
        recompute, prepared: as in ``encoder_layer``.

    Returns:
        [batch, tokens, width] in the dtype of the products: the autocast dtype where autocast is on, as the official model.

    On the Triton path one operator forward and one backward. Of [tokens, width] tensors it keeps four for the backward: x, g, w
    and attention's output; with ``recompute`` two, x and g. Deterministic; cannot be differentiated again.

    Raises:
        TypeError, ValueError, RuntimeError: as ``mssa`` and ``norm_linear`` do.

    Source: CRATE-MAE (arXiv 2404.02446), section 3.
    """
    _check_kinds(step_norm=step_norm, attention_norm=attention_norm, attention=attention)
    dtype, implementation = _choose(x, attention, num_heads)
    checks.tensor("weight", weight, "width width")
    checks.shape("weight", weight, (x.shape[-1],) * 2, "a square matrix as wide as x")
    if implementation != "triton" or attention.out is None:

        def layer(x: Tensor) -> Tensor:
            g = norm_linear(x, weight, **_options(step_norm))
            arguments = dict(num_heads=num_heads, scale=scale, **_options(attention_norm))
            return mssa(g, *attention, residual=g, subtract=True, **arguments)

        return _checkpointed(layer, x, implementation) if recompute else layer(x)
    check_mssa(x, *attention, num_heads, *attention_norm, x, True)
    check_norm_linear(x, weight, None, *step_norm)
    step = weight, step_norm, None, None, False
    return _apply(x, attention, attention_norm, *step, num_heads, scale, recompute, dtype, prepared)


@torch.no_grad()
def prepare_layers(
    x: Tensor,
    layers: Sequence[EncoderWeights] | Sequence[DecoderWeights],
    *,
    num_heads: int,
    step_size: float = 0.1,
) -> list[list[Tensor]] | list[None]:
    """What layers of one kind and size make of their weights before a product, for all of them at once.

    LayerNorm's weight and bias are folded into the matrix that follows them, G = W - W^T W is formed, and all is cast to the
    dtype of the products: two launches for all encoder layers, one for all decoder layers, whose kernels find the weights where
    they lie (``products.preparation``). The weights get their gradients all the same, from the layers' own backward. Prepare
    again after each change of the weights.

    Args:
        x: the tokens, for their device and dtype.
        layers: as ``encoder_layer`` or ``decoder_layer`` will be given them.
        num_heads, step_size: as there.

    Returns:
        For each layer its ``prepared``; None for each where the Triton path is not taken, which alone has a use for it.
    """
    if not layers:
        return []
    is_encoder = isinstance(layers[0], EncoderWeights)
    dtype, implementation = _choose(x, layers[0].attention, num_heads)
    # Parameters that are sharded, say, are made whole a layer at a time only; and one launch takes layers of one make only.
    plain = type(layers[0].attention.qkv) in (Tensor, Parameter)
    alike = len({tuple(None if t is None else (t.shape, t.device) for t in _flat(layer)) for layer in layers}) == 1
    if implementation != "triton" or layers[0].attention.out is None or not plain or not alike:
        return [None] * len(layers)
    columns = zip(*(_flat(layer) for layer in layers), strict=True)
    lists = [[] if column[0] is None else list(column) for column in columns]
    step = number_as_tensor(step_size) if is_encoder else None
    tensors = torch.ops.crate_kernels.prepare_layers(*lists, step, dtype)
    return op.split_prepared(tensors, len(layers), is_encoder, has_bias=layers[0].attention.out_bias is not None)


def _flat(layer: EncoderWeights | DecoderWeights) -> tuple[Tensor | None, ...]:
    """A layer's weights in the order of ``op.Arguments``."""
    matrix, norm = (
        (layer.dictionary, layer.sparse_norm) if isinstance(layer, EncoderWeights) else (layer.weight, layer.step_norm)
    )
    return *layer.attention, *layer.attention_norm[:2], matrix, *norm[:2]


def _choose(x: Tensor, attention: AttentionWeights, num_heads: int) -> tuple[torch.dtype, str]:
    checks.tensor("x", x, "batch tokens width")
    dtype = compute_dtype(x)
    return dtype, dispatch.choose(x, dtype, obstacle_to_triton(_head_dim(attention, num_heads)))


def _check_kinds(**given: Norm | AttentionWeights) -> None:
    for name, value in given.items():
        kind = AttentionWeights if name == "attention" else Norm
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected crate_kernels.{kind.__name__}, got {checks.describe(value)}")


def _head_dim(attention: AttentionWeights, num_heads: int) -> int:
    if not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {checks.describe(num_heads)}")
    return attention.qkv.shape[0] // max(num_heads, 1)


def _options(norm: Norm) -> dict[str, Any]:
    return dict(norm_weight=norm.weight, norm_bias=norm.bias, norm_eps=norm.eps)


def _checkpointed(layer: Callable[[Tensor], Tensor], x: Tensor, implementation: str) -> Tensor:
    # Wherever the backward happens it repeats what ran; only the reference would not be chosen again by itself.
    layer = dispatch.use(implementation)(layer) if implementation == "reference" else layer
    return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)


def _apply(
    x: Tensor,
    attention: AttentionWeights,
    attention_norm: Norm,
    matrix: Tensor,
    norm: Norm,
    step_size: Tensor | None,
    lambd: Tensor | None,
    soft: bool,
    num_heads: int,
    scale: float | None,
    recompute: bool,
    dtype: torch.dtype,
    prepared: list[Tensor] | None,
) -> Tensor:
    """The Triton path, of an encoder layer where there is a ``step_size``, else of a decoder layer."""
    if scale is None:
        scale = _head_dim(attention, num_heads) ** -0.5
    checks.number("scale", scale, positive=True)
    if prepared and prepared[0].dtype != dtype:
        raise ValueError(f"prepared: made for products in {prepared[0].dtype}, and these are in {dtype}; prepare again")
    tensors = *attention, *attention_norm[:2], matrix, *norm[:2], step_size, lambd
    settings = float(attention_norm.eps), float(norm.eps), soft, num_heads, float(scale), recompute, dtype
    return _Layer.apply(x, *tensors, *settings, *(prepared or ()))


class _Layer(torch.autograd.Function):
    """Arguments: x, what ``op.Arguments`` lists up to the numbers, its settings, and the prepared tensors one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        tensors, settings = arguments[: op.TENSORS], arguments[op.TENSORS : op.TENSORS + op.SETTINGS]
        prepared = list(arguments[op.TENSORS + op.SETTINGS :])
        y, kept = torch.ops.crate_kernels.layer_forward(x, *tensors, prepared, *settings)
        # A decoder's backward does without y.
        is_encoder = op.Arguments(*tensors, prepared, *settings).is_encoder
        ctx.save_for_backward(x, y if is_encoder else None, *tensors, *kept, *prepared)
        ctx.kept, ctx.settings, ctx.arguments = len(kept), settings, len(arguments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *rest = ctx.saved_tensors
        tensors, rest = rest[: op.TENSORS], rest[op.TENSORS :]
        kept, prepared = rest[: ctx.kept], rest[ctx.kept :]
        wanted = ctx.needs_input_grad[: 1 + op.WEIGHTS]
        if any(ctx.needs_input_grad[1 + op.WEIGHTS :]):
            raise RuntimeError(
                "step_size, lambd: expected no gradient to be asked for in a whole layer; use mssa and ista"
            )
        found = torch.ops.crate_kernels.layer_backward(
            grad, x, grad if y is None else y, kept, wanted[0], any(wanted[1:]), *tensors, prepared, *ctx.settings
        )
        grads = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return *grads, *[None] * (ctx.arguments - op.WEIGHTS)
