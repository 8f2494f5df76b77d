"""Whole layers of CRATE and CRATE-MAE as functions, and the preparation of all layers' weights at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from crate_kernels import dispatch, validation
from crate_kernels._ops import ops
from crate_kernels.autograd import asked, derivative, save, saved
from crate_kernels.dtypes import compute_dtype
from crate_kernels.ista.api import ISTASources, ista, prepare_ista
from crate_kernels.ista.api import choose as choose_ista
from crate_kernels.ista.form import one_product
from crate_kernels.layers.op import ISTAArguments, MSSAArguments, NormLinearArguments
from crate_kernels.mssa.api import AttentionWeights, MSSASources, mssa, prepare_mssa
from crate_kernels.mssa.api import choose as choose_mssa
from crate_kernels.norm_linear.api import NormLinearSources, norm_linear, prepare_norm_linear
from crate_kernels.norm_linear.api import choose as choose_norm_linear
from crate_kernels.products.norm_folding import Norm, norm_options
from crate_kernels.products.prepared import Prepared
from crate_kernels.shared_attention.api import obstacle_to_triton


class EncoderWeights(NamedTuple):
    """The weights of one encoder layer, in the order of ``encoder_layer``'s arguments."""

    attention_norm: Norm
    attention: AttentionWeights
    sparse_norm: Norm
    dictionary: Tensor


class DecoderWeights(NamedTuple):
    """The weights of one decoder layer, in the order of ``decoder_layer``'s arguments."""

    step_norm: Norm
    weight: Tensor
    attention_norm: Norm
    attention: AttentionWeights


class PreparedLayer(NamedTuple):
    """What ``prepare_layers`` made of one layer's weights: for its MSSA, and for its other step."""

    attention: Prepared | None = None
    step: Prepared | None = None


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
    prepared: PreparedLayer | None = None,
) -> Tensor:
    """One CRATE layer: ``z = x + MSSA(LN x)``, ``y = ISTA(LN z)``.

    Args:
        x: [batch, tokens, width]. Its dtype is that of the stream, the tokens between layers: float32, or a 16-bit dtype for
            half the memory traffic. Products run in the autocast dtype where autocast is on.
        attention_norm, attention: LayerNorm and weights of MSSA (``crate_kernels.mssa``).
        sparse_norm, dictionary: LayerNorm and dictionary of the sparse step (``crate_kernels.ista``), with its step_size, lambd
            and threshold.
        num_heads, scale: of attention; scale is head_dim**-0.5 if None.
        recompute: compute projection and attention again in the backward, instead of keeping their results.
        prepared: this layer's part of what ``prepare_layers`` returned, checked against the weights; made here if None. Ignored
            off the Triton path.

    Returns:
        [batch, tokens, width] in x's dtype.

    The Triton path is one operator a direction, and MSSA's last product finds the moments of z for the LayerNorm that follows.
    The backward keeps four tensors [tokens, width] there: w and attention's output in the dtype of the products, x and z in that
    of the stream; with ``recompute`` only x and z. (y is kept as the next layer's x.) It is deterministic, and second derivatives
    are refused. (Two operators run where one function would not fit: with few tokens and nothing prepared, a step size or lambda
    that learns, a weight given to both steps, or gradients for the second step only.)

    Raises:
        TypeError, ValueError, RuntimeError: as ``mssa`` and ``ista`` do.

    Source: CRATE (arXiv 2306.01129), section 2; CRATE-MAE (arXiv 2404.02446), section 3.
    """
    _check_kinds(attention_norm=attention_norm, attention=attention, sparse_norm=sparse_norm, prepared=prepared)
    prepared = prepared or PreparedLayer()
    of_attention: dict[str, Any] = {
        "num_heads": num_heads, "scale": scale, "skip": x, "out_dtype": x.dtype, "recompute": recompute,
        "prepared": prepared.attention, **norm_options(attention_norm),
    }  # fmt: skip
    of_step: dict[str, Any] = {
        "step_size": step_size, "lambd": lambd, "threshold": threshold, "out_dtype": x.dtype, "prepared": prepared.step,
        **norm_options(sparse_norm),
    }  # fmt: skip
    numbers_ask = any(isinstance(number, Tensor) and number.requires_grad for number in (step_size, lambd))
    in_one_product = prepared.step is not None or (
        isinstance(x, Tensor) and x.ndim == 3 and one_product(x.shape[0] * x.shape[1], x.shape[2])
    )
    first, second = (x, *attention_norm, *attention), (*sparse_norm, dictionary)
    if in_one_product and not numbers_ask and sparse_norm.weight is not None and _fit_one_function(first, second):
        given = choose_mssa(x, *attention, **of_attention).given
        # z, which the step takes, will be laid out as x is.
        step = None if given is None else choose_ista(x, dictionary, **of_step)[2]
        if given is not None and step is not None and step.implementation == "triton":
            return _EncoderLayer.apply(x, *given, *step)
    return ista(mssa(x, *attention, **of_attention), dictionary, **of_step)


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
    prepared: PreparedLayer | None = None,
) -> Tensor:
    """One CRATE-MAE decoder layer: ``g = LN(x) W^T``, ``y = g - MSSA(LN g)``.

    Args:
        x: [batch, tokens, width].
        step_norm, weight: LayerNorm and W [width, width] of the linear step (``crate_kernels.norm_linear``).
        attention_norm, attention, num_heads, scale: of MSSA (``crate_kernels.mssa``).
        recompute, prepared: as in ``encoder_layer``.

    Returns:
        [batch, tokens, width] in the dtype of the products: the autocast dtype where autocast is on, as in the official model.

    The Triton path is one operator a direction, and the linear step's product finds the moments of g for the LayerNorm that
    follows. The backward keeps four tensors [tokens, width] there: x, g, w and attention's output; with ``recompute`` only x and
    g. It is deterministic, and second derivatives are refused.

    Raises:
        TypeError, ValueError, RuntimeError: as ``mssa`` and ``norm_linear`` do.

    Source: CRATE-MAE (arXiv 2404.02446), section 3.
    """
    _check_kinds(step_norm=step_norm, attention_norm=attention_norm, attention=attention, prepared=prepared)
    validation.tensors(x=(x, "batch tokens width"), weight=(weight, "width width"))
    prepared = prepared or PreparedLayer()
    of_attention: dict[str, Any] = {
        "num_heads": num_heads, "scale": scale, "subtract": True, "recompute": recompute, "prepared": prepared.attention,
        **norm_options(attention_norm),
    }  # fmt: skip
    of_step: dict[str, Any] = {"prepared": prepared.step, **norm_options(step_norm)}
    if step_norm.weight is not None and _fit_one_function((x, *step_norm, weight), (*attention_norm, *attention)):
        # g, which attention takes, will have the shape of x, and the dtype of the products.
        given = choose_mssa(x, *attention, skip=x, **of_attention).given
        step = None if given is None else choose_norm_linear(x, weight, **of_step)[2]
        if given is not None and step is not None:
            return _DecoderLayer.apply(x, *step, *given)
    g = norm_linear(x, weight, **of_step)
    return mssa(g, *attention, skip=g, **of_attention)


class _EncoderLayer(torch.autograd.Function):
    """Arguments: x, then ``MSSAArguments`` and ``ISTAArguments``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        y, kept = ops.encoder_layer_forward(x, *arguments)
        save(ctx, arguments, x, y, *kept)
        return y

    @staticmethod
    @derivative("encoder_layer")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, (x, y, *kept) = saved(ctx)
        want_x, *want_fields = ctx.needs_input_grad
        fields = len(MSSAArguments._fields)
        attention, step = MSSAArguments(*want_fields[:fields]), ISTAArguments(*want_fields[fields:])
        needs = [want_x, *_needs(attention), step.dictionary or step.norm_weight or step.norm_bias]
        grads = ops.encoder_layer_backward(grad, x, y, kept, needs, *given)
        grad_x, of_attention, (of_dictionary, *of_norm) = grads[0], grads[1:6], grads[6:]
        none = [None] * (fields - 5)
        return asked((grad_x, *of_attention, *none, of_dictionary, None, *of_norm), ctx.needs_input_grad)


class _DecoderLayer(torch.autograd.Function):
    """Arguments: x, then ``NormLinearArguments`` and ``MSSAArguments``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        y, kept = ops.decoder_layer_forward(x, *arguments)
        save(ctx, arguments, x, *kept)
        return y

    @staticmethod
    @derivative("decoder_layer")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, (x, *kept) = saved(ctx)
        want_x, *want_fields = ctx.needs_input_grad
        fields = len(NormLinearArguments._fields)
        needs = [want_x, any(want_fields[:fields]), *_needs(MSSAArguments(*want_fields[fields:]))]
        grads = ops.decoder_layer_backward(grad, x, kept, needs, *given)
        none = [None] * (fields - 4)
        return asked((*grads[:5], *none, *grads[5:]), ctx.needs_input_grad)


def _fit_one_function(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether one autograd function should do both steps of a layer, given the tensors of each.

    Not if they have a weight in common: a tensor that is given twice is refused by torch.compile, and is not replayed. And not if
    only the second step needs gradients: the function would keep for the backward what only the first step reads.
    """
    if any(one is other and isinstance(one, Tensor) for one in first for other in second):
        return False
    need = [any(isinstance(one, Tensor) and one.requires_grad for one in step) for step in (first, second)]
    return need != [False, True] or not torch.is_grad_enabled()


def _needs(want: MSSAArguments) -> list[Any]:
    """Whether MSSA's backward is asked for gradients of qkv or its LayerNorm, and of out or its bias."""
    return [want.qkv_weight or want.norm_weight or want.norm_bias, want.out_weight or want.out_bias]


def prepare_layers(
    x: Tensor,
    layers: Sequence[EncoderWeights] | Sequence[DecoderWeights],
    *,
    num_heads: int,
    step_size: float | Tensor = 0.1,
) -> list[PreparedLayer | None]:
    """Prepares the weights of many layers of one kind and size at once.

    The weight and bias of each LayerNorm are folded into the matrix that follows, G = W - W^T W is formed, and all is cast to the
    dtype of the products. That takes two launches for all layers of a kind (``products.preparation``). The weights still get
    their gradients, from the backward of each layer. Prepare again whenever weights have changed: layers raise if what they are
    given was made of other values.

    Args:
        x: the tokens, for their device and dtype.
        layers: the weights that ``encoder_layer`` or ``decoder_layer`` will be called with.
        num_heads, step_size: as there.

    Returns:
        The argument ``prepared`` of each layer; None for all where the Triton path is not taken, as no other path uses it.

    Raises:
        TypeError, ValueError: layers are of different kinds, or an argument is one that the layers would refuse.
    """
    if not layers:
        return []
    kind, first, dtype = type(layers[0]), layers[0].attention, compute_dtype(x)
    if kind not in (EncoderWeights, DecoderWeights) or any(type(layer) is not kind for layer in layers):
        raise TypeError(
            f"layers: expected EncoderWeights or DecoderWeights, and all alike, got {validation.describe(layers[-1])}"
        )
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads: expected an int of at least 1, got {num_heads}")
    validation.number_or_tensor("step_size", step_size, positive=True)
    sizes: dict[str, Any] = {}
    validation.tensor("x", x, "batch tokens width", sizes)
    for name, value, dims in _named(layers[0]):  # if the others are not like it, nothing is prepared here (``_make``)
        if value is not None:
            validation.tensor(name, value, dims, sizes)
    head_dim = first.qkv.shape[0] // num_heads
    implementation = dispatch.choose("prepare_layers", x, dtype, obstacle_to_triton(head_dim))
    attention, sparse_steps, linear_steps = [], [], []
    for layer in layers:
        qkv, out, out_bias = layer.attention
        if implementation != "triton" or out is None:
            return [None] * len(layers)
        attention.append(MSSASources(qkv, out, out_bias, *layer.attention_norm[:2]))
        if isinstance(layer, EncoderWeights):
            sparse_steps.append(ISTASources(layer.dictionary, *layer.sparse_norm[:2], step_size))
        else:
            linear_steps.append(NormLinearSources(layer.weight, None, *layer.step_norm[:2]))
    # One launch takes layers that are alike in shapes and device. Subclasses of Tensor are left out: sharded parameters, for
    # one, are to be gathered one layer at a time.
    plain = type(first.qkv) in (Tensor, Parameter)
    sources = zip(attention, sparse_steps or linear_steps, strict=True)
    makes = [[_make(source) for source in (*ours, *others)] for ours, others in sources]
    if not plain or any(make != makes[0] for make in makes):
        return [None] * len(layers)
    # Only here: an exported graph would keep the empty block, and then could not be loaded.
    with torch.no_grad():
        attentions = prepare_mssa(attention, dtype)
        steps = prepare_ista(sparse_steps, dtype) if sparse_steps else prepare_norm_linear(linear_steps, dtype)
        return list(map(PreparedLayer, attentions, steps))


def _make(source: Tensor | float | None) -> tuple[torch.Size, torch.device] | None:
    """What must be alike in layers that one launch prepares."""
    return (source.shape, source.device) if isinstance(source, Tensor) else None


def _named(layer: EncoderWeights | DecoderWeights) -> list[tuple[str, Tensor | None, str]]:
    """A layer's tensors, with their names for error messages and their dimensions."""
    if isinstance(layer, EncoderWeights):
        norm, name, square = layer.sparse_norm, "sparse_norm", ("dictionary", layer.dictionary)
    else:
        norm, name, square = layer.step_norm, "step_norm", ("weight", layer.weight)
    out_dims = (("qkv", "inner width"), ("out", "width inner"), ("out_bias", "width"))
    named = [(f"attention.{field}", getattr(layer.attention, field), dims) for field, dims in out_dims]
    for norm_name, one in (("attention_norm", layer.attention_norm), (name, norm)):
        named += [(f"{norm_name}.{field}", getattr(one, field), "width") for field in ("weight", "bias")]
    return [*named, (*square, "width width")]


def _check_kinds(prepared: PreparedLayer | None, **given: Norm | AttentionWeights) -> None:
    for name, value in given.items():
        kind = AttentionWeights if name == "attention" else Norm
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected crate_kernels.{kind.__name__}, got {validation.describe(value)}")
    if prepared is not None and not isinstance(prepared, PreparedLayer):
        raise TypeError(f"prepared: expected what prepare_layers gives a layer, got {validation.describe(prepared)}")
